/* Vectors of 16 numbers and rows of them in memory, bfloat16 or float32; their exponential; words at random for dropout.

   Written with the vector types of GCC and Clang, so it becomes AVX-512, AVX2 or NEON code as the processor has it.
   kernels.py compiles the C files here at first use. Arithmetic is in float32. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h> /* where one instruction does what the vector types take several for */
#endif

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

static inline Floats larger(Floats x, Floats y) { /* y where either is no number */
#ifdef __AVX512F__
    return (Floats)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return either(x > y, x, y);
#endif
}

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
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    Words bits = (Words)x;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
#endif
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
#ifdef __AVX512F__
    Floats whole = (Floats)_mm512_roundscale_ps((__m512)y, 0);
#else
    Floats whole = (y + 12582912.0f) - 12582912.0f; /* 1.5 · 2^23: what is added and taken away rounds */
#endif
    Floats f = y - whole;
    Floats p = f * 1.54035304e-4f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)whole); /* 0 for −∞, whatever p is */
#else
    Floats scaled = p * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
    return where(~(y < -126.0f), scaled);
#endif
}

/* A random key for each row (SplitMix64, Steele et al. 2014), and from it a random word for each place (MurmurHash3's
   finaliser with Wellons' constants, lowbias32): nothing is drawn in order, so any thread computes any row. */
static inline uint64_t key(uint64_t seed, uint64_t r) {
    uint64_t z = seed + (r + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline Ints kept_at(Words places, Words low, Words high, uint32_t drop) { /* the halves of rows' keys */
    Words x = places * 0x9e3779b9u + low;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x ^= high;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return (Ints)((x ^ (x >> 16)) >= drop);
}

static inline Ints kept(uint64_t key, long block, uint32_t drop) { /* a block of one row */
    Words zero = {0};
    return kept_at(PLACES + (uint32_t)(block * LANES), zero + (uint32_t)key, zero + (uint32_t)(key >> 32), drop);
}
