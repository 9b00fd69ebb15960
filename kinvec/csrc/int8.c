/* Rows of numbers as 8-bit integers with a scale each, and the products of such rows as numbers again. */

#include "rows.h"

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

#define EACH(f, d) f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d), \
                   f(8, d), f(9, d), f(10, d), f(11, d), f(12, d), f(13, d), f(14, d), f(15, d)
#define PARTNER(i, d) (i) ^ (d)
#define SIGN(i, d) (i) & (d) ? -1.0f : 1.0f
#ifdef __clang__
#define PARTNERS(x, d) __builtin_shufflevector(x, x, EACH(PARTNER, d))
#else
#define PARTNERS(x, d) __builtin_shuffle(x, (Ints){EACH(PARTNER, d)})
#endif
#define MIX(x, d) x = x * (Floats){EACH(SIGN, d)} + PARTNERS(x, d) /* pairs of lanes, d apart: their sum and difference */

static inline Ints greater(Ints x, Ints y) {
#ifdef __AVX512F__
    return (Ints)_mm512_max_epi32((__m512i)x, (__m512i)y);
#else
    return (x & (x > y)) | (y & ~(x > y));
#endif
}

/* `group` vectors of a row, from block b on, times `signs` and Sylvester's matrix: sums and differences of numbers that are
   1, 2, 4, … apart. Returns the bits of the largest; those of what is no finite number are larger than all others. */
static inline Ints turn(Floats *to, const void *from, const float *signs, long r, long n, long b, int half, const int group) {
    Floats z[8];
    Ints high = {0};
    for (int i = 0; i < group; i++) {
        z[i] = get(from, r, n, b + i, half, 0) * get(signs, 0, group * LANES, i, 0, 0);
        MIX(z[i], 1);
        MIX(z[i], 2);
        MIX(z[i], 4);
        MIX(z[i], 8);
    }
    for (int d = 1; d < group; d *= 2)
        for (int i = 0; i < group; i++)
            if (!(i & d)) {
                Floats x = z[i], y = z[i + d];
                z[i] = x + y;
                z[i + d] = x - y;
            }
    for (int i = 0; i < group; i++) {
        high = greater(high, (Ints)z[i] & INT32_MAX);
        to[i] = z[i];
    }
    return high;
}

/* Rows, filled up to whole vectors with 0 and turned in groups of 1, 2, 4 or 8 vectors, as codes of −most to most around most + 1,
   and a scale for each; the scale of a row that holds what is no finite number is none either. */
void round_rows(const void *from, const float *signs, uint8_t *codes, float *scales, long rows, long n, int half,
                int group, int most, float tiny) {
    float share = 1.0f / sqrtf(group * LANES);
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        long blocks = BLOCKS(n);
        Floats z[blocks];
        Ints high = {0};
        for (long b = 0; b < blocks; b += group) {
            Ints here = group == 8   ? turn(z + b, from, signs, r, n, b, half, 8)
                        : group == 4 ? turn(z + b, from, signs, r, n, b, half, 4)
                        : group == 2 ? turn(z + b, from, signs, r, n, b, half, 2)
                                     : turn(z + b, from, signs, r, n, b, half, 1);
            high = greater(high, here);
        }
        for (int d = 8; d; d /= 2)
            for (int i = 0; i < d; i++) high[i] = high[i + d] > high[i] ? high[i + d] : high[i];
        float size = ((Floats)high)[0] * share, scale = size < most * tiny ? tiny : size / most;
        for (long b = 0; b < blocks; b++) { /* cut off, which rounds: none is negative */
            Ints code = __builtin_convertvector(z[b] * (share / scale) + (most + 1.5f), Ints);
            Bytes bytes = __builtin_convertvector(code, Bytes);
            memcpy(codes + (r * blocks + b) * LANES, &bytes, sizeof bytes);
        }
        scales[r] = scale;
    }
}

/* Each row times its scale, and `bias` added, in place. */
void scale_rows(void *rows_of, const float *scales, const float *bias, long rows, long n, int half) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++)
        for (long b = 0; b < BLOCKS(n); b++)
            put(rows_of, get(rows_of, r, n, b, half, 0) * scales[r] + get(bias, 0, n, b, 0, 0), r, n, b, half);
}
