/* Rows of numbers, bfloat16 or float32, in one pass over memory: softmax with dropout, LayerNorm of a sum, dropout.

   Written with the vector types of GCC and Clang, so it becomes AVX-512, AVX2 or NEON code as the processor has it.
   kernels.py compiles this file at first use and says what each function computes. Arithmetic is in float32. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

#define BLOCKS(n) (((n) + LANES - 1) / LANES)

static const Words PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline Floats where(Ints mask, Floats x) { return (Floats)(mask & (Ints)x); } /* elsewhere +0 */

static inline Floats either(Ints mask, Floats x, Floats y) { return (Floats)((mask & (Ints)x) | (~mask & (Ints)y)); }

static inline float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

static inline float sum(Floats x) {
    union { Floats whole; Eight half[2]; } a = {x};
    union { Eight whole; Four half[2]; } b = {a.half[0] + a.half[1]};
    Four c = b.half[0] + b.half[1];
    return (c[0] + c[1]) + (c[2] + c[3]);
}

static inline Floats widen(Halves x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }

static inline Halves narrow(Floats x) { /* to the nearest, ties to even */
    Words bits = (Words)x;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
}

/* Fewer than 64 bytes, as moves of fixed sizes. */
static inline void copy(void *to, const void *from, long bytes) {
    char *t = to;
    const char *f = from;
#define MOVE(size) if (bytes & size) { memcpy(t, f, size); t += size; f += size; }
    MOVE(32) MOVE(16) MOVE(8) MOVE(4) MOVE(2)
#undef MOVE
}

/* Block b of row r of a matrix of width n; what the row's last block lacks is `fill`. */
static inline Floats get(const void *from, long r, long n, long b, int half, float fill) {
    long at = r * n + b * LANES, count = n - b * LANES;
    Floats x;
    Halves small;
    if (count >= LANES) {
        if (!half) return memcpy(&x, (const float *)from + at, sizeof x), x;
        return memcpy(&small, (const uint16_t *)from + at, sizeof small), widen(small);
    }
    if (half) {
        memset(&small, 0, sizeof small);
        copy(&small, (const uint16_t *)from + at, 2 * count);
        x = widen(small);
    } else {
        memset(&x, 0, sizeof x);
        copy(&x, (const float *)from + at, 4 * count);
    }
    return either((Ints)(PLACES < (uint32_t)count), x, (Floats){0} + fill);
}

static inline void put(void *to, Floats x, long r, long n, long b, int half) {
    long at = r * n + b * LANES, count = n - b * LANES;
    Halves small;
    if (half) small = narrow(x);
    if (count >= LANES) {
        if (half) memcpy((uint16_t *)to + at, &small, sizeof small);
        else memcpy((float *)to + at, &x, sizeof x);
    } else if (half) copy((uint16_t *)to + at, &small, 2 * count);
    else copy((float *)to + at, &x, 4 * count);
}

/* exp for x ≤ 0, to two units in the last place: 2^whole times a polynomial in the rest; what underflows is 0. */
static inline Floats exponential(Floats x) {
    Floats y = x * 1.44269504f;
    Floats whole = (y + 12582912.0f) - 12582912.0f; /* 1.5 · 2^23: what is added and taken away rounds */
    Floats f = y - whole;
    Floats p = f * 1.54035304e-4f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    Floats scaled = p * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
    return where(~(y < -126.0f), scaled);
}

/* A random key for each row (SplitMix64, Steele et al. 2014), and from it a random word for each place (MurmurHash3's
   finaliser with Wellons' constants, lowbias32): nothing is drawn in order, so any thread computes any row. */
static inline uint64_t key(uint64_t seed, uint64_t r) {
    uint64_t z = seed + (r + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline Ints kept(uint64_t key, long block, uint32_t drop) {
    Words x = (PLACES + (uint32_t)(block * LANES)) * 0x9e3779b9u + (uint32_t)key;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x ^= (uint32_t)(key >> 32);
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return (Ints)((x ^ (x >> 16)) >= drop);
}

/* scores → probabilities, in place; with `seen`, those that dropout drops get a minus sign, and `seen` the others × rescale. */
void softmax(void *scores, void *seen, const void *bias, float scale, long rows, long n, int half, uint32_t drop,
             float rescale, uint64_t seed) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        long blocks = BLOCKS(n);
        Floats p[blocks], high = (Floats){0} - INFINITY, total = {0};
        for (long b = 0; b < blocks; b++) {
            p[b] = get(scores, r, n, b, half, -INFINITY) * scale;
            if (bias) p[b] += get(bias, r % n, n, b, half, 0);
            high = either(p[b] > high, p[b], high);
        }
        float most = largest(high);
        for (long b = 0; b < blocks; b++) total += p[b] = exponential(p[b] - most);
        float share = 1.0f / sum(total);
        uint64_t row = key(seed, r);
        for (long b = 0; b < blocks; b++) {
            Floats x = p[b] * share;
            if (!seen) {
                put(scores, x, r, n, b, half);
                continue;
            }
            Ints keep = kept(row, b, drop);
            put(scores, (Floats)((Ints)x | (~keep & INT32_MIN)), r, n, b, half);
            put(seen, where(keep, x * rescale), r, n, b, half);
        }
    }
}

/* The gradient for what softmax left, from that and the gradient for `seen`, which it replaces; `seen` is made again. */
void softmax_backward(const void *probs, void *grad, void *seen, float scale, long rows, long n, int half,
                      float rescale) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        long blocks = BLOCKS(n);
        Floats p[blocks], g[blocks], total = {0};
        for (long b = 0; b < blocks; b++) {
            p[b] = get(probs, r, n, b, half, 0);
            Floats s = where((Ints)p[b] >= 0, p[b] * rescale);
            g[b] = get(grad, r, n, b, half, 0) * s;
            total += g[b];
            if (seen) put(seen, s, r, n, b, half);
        }
        float all = sum(total);
        for (long b = 0; b < blocks; b++)
            put(grad, (g[b] - (Floats)((Ints)p[b] & INT32_MAX) * all) * scale, r, n, b, half);
    }
}

/* from → to, dropped or × rescale; the same seed drops the same places again. */
void dropout(const void *from, void *to, long rows, long n, int half, uint32_t drop, float rescale, uint64_t seed) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        uint64_t row = key(seed, r);
        for (long b = 0; b < BLOCKS(n); b++)
            put(to, where(kept(row, b, drop), get(from, r, n, b, half, 0) * rescale), r, n, b, half);
    }
}

/* norm(x + dropout(h)), scaled by `weight` and shifted by `bias`; for the backward pass the sums and each row's mean and
   1 / deviation. `half_h` says whether h holds bfloat16, `half_w` the weights, `half` all else. */
void add_norm(const void *h, const void *x, const void *weight, const void *bias, void *sums, void *to, float *moments,
              long rows, long n, int half_h, int half_w, int half, float epsilon, uint32_t drop, float rescale,
              uint64_t seed) {
    long blocks = BLOCKS(n), rest = blocks * LANES - n;
    Floats w[blocks], shift[blocks];
    for (long b = 0; b < blocks; b++) {
        w[b] = get(weight, 0, n, b, half_w, 0);
        shift[b] = get(bias, 0, n, b, half_w, 0);
    }
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        Floats z[blocks], total = {0}, squares = {0};
        uint64_t row = key(seed, r);
        for (long b = 0; b < blocks; b++) {
            z[b] = get(h, r, n, b, half_h, 0);
            if (drop) z[b] = where(kept(row, b, drop), z[b] * rescale);
            z[b] += get(x, r, n, b, half, 0);
            total += z[b];
            if (sums) put(sums, z[b], r, n, b, half);
        }
        float mean = sum(total) / n;
        for (long b = 0; b < blocks; b++) {
            z[b] -= mean;
            squares += z[b] * z[b];
        }
        /* what fills up the last block was 0, and is now mean² away from the mean */
        float deviation = 1.0f / sqrtf((sum(squares) - rest * mean * mean) / n + epsilon);
        for (long b = 0; b < blocks; b++) put(to, z[b] * deviation * w[b] + shift[b], r, n, b, half);
        if (sums) {
            moments[2 * r] = mean;
            moments[2 * r + 1] = deviation;
        }
    }
}

/* The gradients for h, x, and, a row for each thread, for weight and bias. */
void add_norm_backward(const void *grad, const void *sums, const float *moments, const void *weight, void *grad_h,
                       void *grad_x, float *grad_weight, float *grad_bias, int threads, long rows, long n, int half_h,
                       int half_w, int half, uint32_t drop, float rescale, uint64_t seed) {
    long blocks = BLOCKS(n);
    Floats w[blocks];
    for (long b = 0; b < blocks; b++) w[b] = get(weight, 0, n, b, half_w, 0);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        Floats z[blocks], g[blocks], for_weight[blocks], for_bias[blocks];
        memset(for_weight, 0, sizeof for_weight);
        memset(for_bias, 0, sizeof for_bias);
        for (long r = rows * thread / threads; r < rows * (thread + 1) / threads; r++) {
            float mean = moments[2 * r], deviation = moments[2 * r + 1];
            uint64_t row = key(seed, r);
            Floats total = {0}, along = {0};
            for (long b = 0; b < blocks; b++) {
                z[b] = (get(sums, r, n, b, half, mean) - mean) * deviation;
                g[b] = get(grad, r, n, b, half, 0);
                for_weight[b] += g[b] * z[b];
                for_bias[b] += g[b];
                g[b] *= w[b];
                total += g[b];
                along += g[b] * z[b];
            }
            float all = sum(total) / n, slope = sum(along) / n;
            for (long b = 0; b < blocks; b++) {
                Floats d = (g[b] - all - z[b] * slope) * deviation;
                put(grad_x, d, r, n, b, half);
                put(grad_h, drop ? where(kept(row, b, drop), d * rescale) : d, r, n, b, half_h);
            }
        }
        for (long b = 0; b < blocks; b++) {
            put(grad_weight, for_weight[b], thread, n, b, 0);
            put(grad_bias, for_bias[b], thread, n, b, 0);
        }
    }
}
