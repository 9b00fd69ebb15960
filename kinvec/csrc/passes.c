/* What lies between a model's products, in one pass over memory: softmax with dropout, LayerNorm of a sum, dropout.
   kernels.py says what each function computes. */

#include "rows.h"

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
            high = larger(p[b], high);
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
