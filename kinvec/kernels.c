/* Rows of numbers, bfloat16 or float32, in one pass over memory: softmax with dropout, its backward pass, dropout.

   Written with the vector types of GCC and Clang, so it becomes AVX-512, AVX2 or NEON code as the processor has it.
   kernels.py compiles this file at first use and says what each function computes. Arithmetic is in float32. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

#define BLOCKS(n) (((n) + LANES - 1) / LANES)

static const Words PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline Floats where(Ints mask, Floats x) { return (Floats)(mask & (Ints)x); } /* elsewhere +0 */

static inline Floats larger(Floats x, Floats y) {
    Ints first = x > y;
    return (Floats)((first & (Ints)x) | (~first & (Ints)y));
}

static inline float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

static inline float sum(Floats x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

static inline Floats widen(Halves x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }

static inline Halves narrow(Floats x) { /* to the nearest, ties to even */
    Words bits = (Words)x;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
}

/* Row `r` of a matrix of width n; the last block is filled up with `fill`. */
static inline void load(Floats *row, const void *from, long r, long n, int half, float fill) {
    long whole = n / LANES, rest = n % LANES;
    if (rest)
        for (int i = 0; i < LANES; i++) row[whole][i] = fill;
    if (!half) {
        memcpy(row, (const float *)from + r * n, n * sizeof(float));
        return;
    }
    const uint16_t *x = (const uint16_t *)from + r * n;
    for (long b = 0; b < whole; b++) {
        Halves some;
        memcpy(&some, x + b * LANES, sizeof some);
        row[b] = widen(some);
    }
    for (long i = 0; i < rest; i++) {
        uint32_t bits = (uint32_t)x[whole * LANES + i] << 16;
        memcpy((float *)&row[whole] + i, &bits, sizeof bits);
    }
}

static inline void store(void *to, const Floats *row, long r, long n, int half) {
    if (!half) {
        memcpy((float *)to + r * n, row, n * sizeof(float));
        return;
    }
    uint16_t *x = (uint16_t *)to + r * n;
    long whole = n / LANES, rest = n % LANES;
    for (long b = 0; b < whole; b++) {
        Halves some = narrow(row[b]);
        memcpy(x + b * LANES, &some, sizeof some);
    }
    if (rest) {
        Halves some = narrow(row[whole]);
        for (long i = 0; i < rest; i++) x[whole * LANES + i] = some[i];
    }
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

/* A random key for each row (SplitMix64, Steele et al. 2014), and from it a random word for each place (the finaliser
   of MurmurHash3 with better constants): nothing is drawn in order, so any thread computes any row. */
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
        Floats p[blocks], other[blocks], high, total = {0};
        load(p, scores, r, n, half, -INFINITY);
        if (bias) load(other, bias, r % n, n, half, 0);
        for (long b = 0; b < blocks; b++) p[b] = bias ? p[b] * scale + other[b] : p[b] * scale;
        high = p[0];
        for (long b = 1; b < blocks; b++) high = larger(p[b], high);
        float most = largest(high);
        for (long b = 0; b < blocks; b++) total += p[b] = exponential(p[b] - most);
        float share = 1.0f / sum(total);
        uint64_t row = key(seed, r);
        for (long b = 0; b < blocks; b++) {
            p[b] *= share;
            if (!seen) continue;
            Ints keep = kept(row, b, drop);
            other[b] = where(keep, p[b] * rescale);
            p[b] = (Floats)((Ints)p[b] | (~keep & INT32_MIN));
        }
        store(scores, p, r, n, half);
        if (seen) store(seen, other, r, n, half);
    }
}

/* The gradient for what softmax left, from that and the gradient for `seen`, which it replaces; `seen` is made again. */
void softmax_backward(const void *probs, void *grad, void *seen, float scale, long rows, long n, int half,
                      float rescale) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        long blocks = BLOCKS(n);
        Floats p[blocks], g[blocks], s[blocks], total = {0};
        load(p, probs, r, n, half, 0);
        load(g, grad, r, n, half, 0);
        for (long b = 0; b < blocks; b++) {
            s[b] = where((Ints)p[b] >= 0, p[b] * rescale);
            g[b] *= s[b];
            total += g[b];
        }
        float all = sum(total);
        for (long b = 0; b < blocks; b++) g[b] = (g[b] - (Floats)((Ints)p[b] & INT32_MAX) * all) * scale;
        store(grad, g, r, n, half);
        if (seen) store(seen, s, r, n, half);
    }
}

/* from → to, dropped or × rescale; the same seed drops the same places again. */
void dropout(const void *from, void *to, long rows, long n, int half, uint32_t drop, float rescale, uint64_t seed) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        long blocks = BLOCKS(n);
        Floats x[blocks];
        uint64_t row = key(seed, r);
        load(x, from, r, n, half, 0);
        for (long b = 0; b < blocks; b++) x[b] = where(kept(row, b, drop), x[b] * rescale);
        store(to, x, r, n, half);
    }
}

/* norm(x + dropout(h)), scaled by `weight` and shifted by `bias`; for the backward pass the sums and each row's mean and
   1 / deviation. `half_h` says whether h holds bfloat16, `half_w` the weights, `half` all else. */
void add_norm(const void *h, const void *x, const void *weight, const void *bias, void *sums, void *to, float *moments,
              long rows, long n, int half_h, int half_w, int half, float epsilon, uint32_t drop, float rescale,
              uint64_t seed) {
    Floats w[BLOCKS(n)], shift[BLOCKS(n)];
    load(w, weight, 0, n, half_w, 0);
    load(shift, bias, 0, n, half_w, 0);
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        long blocks = BLOCKS(n), rest = blocks * LANES - n;
        Floats z[blocks], other[blocks], total = {0}, squares = {0};
        uint64_t row = key(seed, r);
        load(z, h, r, n, half_h, 0);
        load(other, x, r, n, half, 0);
        for (long b = 0; b < blocks; b++) {
            if (drop) z[b] = where(kept(row, b, drop), z[b] * rescale);
            z[b] += other[b];
            total += z[b];
        }
        float mean = sum(total) / n;
        for (long b = 0; b < blocks; b++) {
            Floats from_mean = z[b] - mean;
            squares += from_mean * from_mean;
        }
        /* what fills up the last block is 0, and so mean² away from the mean */
        float deviation = 1.0f / sqrtf((sum(squares) - rest * mean * mean) / n + epsilon);
        if (sums) {
            store(sums, z, r, n, half);
            moments[2 * r] = mean;
            moments[2 * r + 1] = deviation;
        }
        for (long b = 0; b < blocks; b++) z[b] = (z[b] - mean) * deviation * w[b] + shift[b];
        store(to, z, r, n, half);
    }
}

/* The gradients for h, x, and, a row for each thread, for weight and bias. */
void add_norm_backward(const void *grad, const void *sums, const float *moments, const void *weight, void *grad_h,
                       void *grad_x, float *grad_weight, float *grad_bias, int threads, long rows, long n, int half_h,
                       int half_w, int half, uint32_t drop, float rescale, uint64_t seed) {
    long blocks = BLOCKS(n);
    Floats w[blocks];
    load(w, weight, 0, n, half_w, 0);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        Floats z[blocks], g[blocks], for_weight[blocks], for_bias[blocks];
        memset(for_weight, 0, sizeof for_weight);
        memset(for_bias, 0, sizeof for_bias);
        for (long r = rows * thread / threads; r < rows * (thread + 1) / threads; r++) {
            float mean = moments[2 * r], deviation = moments[2 * r + 1];
            uint64_t row = key(seed, r);
            Floats total = {0}, along = {0};
            load(z, sums, r, n, half, mean);
            load(g, grad, r, n, half, 0);
            for (long b = 0; b < blocks; b++) {
                z[b] = (z[b] - mean) * deviation;
                for_weight[b] += g[b] * z[b];
                for_bias[b] += g[b];
                g[b] *= w[b];
                total += g[b];
                along += g[b] * z[b];
            }
            float all = sum(total) / n, slope = sum(along) / n;
            for (long b = 0; b < blocks; b++) g[b] = (g[b] - all - z[b] * slope) * deviation;
            store(grad_x, g, r, n, half);
            for (long b = 0; b < blocks; b++)
                if (drop) g[b] = where(kept(row, b, drop), g[b] * rescale);
            store(grad_h, g, r, n, half_h);
        }
        store(grad_weight, for_weight, thread, n, 0);
        store(grad_bias, for_bias, thread, n, 0);
    }
}
