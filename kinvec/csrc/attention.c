/* Attention within texts of one length, forward and backward, in bfloat16: no row of scores leaves the cache.

   After FlashAttention (Dao et al. 2022), but a row of scores is short enough to lie whole in the first cache, so that its
   softmax is the plain one. Products are made of tiles of 8 rows and 32 columns, whose sums stay in registers. */

#include "rows.h"

enum { ROWS = 8, COLUMNS = 2 * LANES }; /* of a tile */
typedef Floats Tile[ROWS][2];

typedef struct { /* `first` token, texts and their length; steps, in numbers, between tokens and between heads; `draw` */
    long first, texts, length, heads, groups, width, values;
    long q_token, q_head, k_token, k_head, v_token, v_head;
    float scale, rescale;
    uint32_t drop;
    uint64_t seed;
} Run;

int multiplies(void) { /* whether the processor multiplies bfloat16 in vectors */
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

static inline Floats dot(Floats to, Words a, Words b) { /* two products of bfloat16 are added to each number */
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)to, (__m512bh)a, (__m512bh)b);
#else
    return to + (Floats)(a << 16) * (Floats)(b << 16) + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

/* `to`, or 0 where it is NULL, + a product of 8 rows and 32 columns. Its inner side lies in pairs: pair p of row r is
   a[r · row + p · step], those of the columns are the 32 words from b + 32 p. */
static inline void tile(Tile out, Tile to, const uint32_t *a, long row, long step, const uint32_t *b, long pairs) {
    Tile sums;
    if (to) memcpy(sums, to, sizeof sums);
    else memset(sums, 0, sizeof sums);
    for (long p = 0; p < pairs; p++) {
        Words left, right;
        memcpy(&left, b + p * COLUMNS, sizeof left);
        memcpy(&right, b + p * COLUMNS + LANES, sizeof right);
        for (int r = 0; r < ROWS; r++) {
            Words pair = (Words){0} + a[r * row + p * step];
            sums[r][0] = dot(sums[r][0], pair, left);
            sums[r][1] = dot(sums[r][1], pair, right);
        }
    }
    memcpy(out, sums, sizeof sums);
}

/* ---- how bfloat16 rows lie in products; what fills them up is 0 ---- */

static inline long wide(long n) { return (n + COLUMNS - 1) / COLUMNS; }

/* Rows become columns, their numbers the inner side: [blocks of 32 rows][pairs of numbers][32]. */
static void as_columns(uint32_t *to, const uint16_t *from, long token, long rows, long width) {
    long pairs = width / 2;
    memset(to, 0, wide(rows) * pairs * COLUMNS * sizeof *to);
    for (long r = 0; r < rows; r++)
        for (long p = 0; p < pairs; p++)
            memcpy(to + (r / COLUMNS * pairs + p) * COLUMNS + r % COLUMNS, from + r * token + 2 * p, sizeof *to);
}

static inline Words take(const uint16_t *from, long count) {
    Halves x;
    memset(&x, 0, sizeof x);
    if (count >= LANES) memcpy(&x, from, sizeof x);
    else if (count > 0) copy(&x, from, 2 * count);
    return __builtin_convertvector(x, Words);
}

/* Rows become the inner side, their numbers the columns: [blocks of 32 numbers][pairs of rows][32]. */
static void as_pairs(uint32_t *to, const uint16_t *from, long token, long rows, long width) {
    long pairs = wide(rows) * LANES;
    for (long p = 0; p < pairs; p++)
        for (long b = 0; b < 2 * wide(width); b++) {
            const uint16_t *here = from + 2 * p * token + b * LANES;
            Words pair = take(here, 2 * p < rows ? width - b * LANES : 0);
            pair |= take(here + token, 2 * p + 1 < rows ? width - b * LANES : 0) << 16;
            memcpy(to + (b / 2 * pairs + p) * COLUMNS + b % 2 * LANES, &pair, sizeof pair);
        }
}

/* Rows as the left side, up to a multiple of 8: [rows][pairs of numbers]. */
static void as_rows(uint32_t *to, const uint16_t *from, long token, long rows, long width) {
    for (long r = 0; r < rows; r++) memcpy(to + r * width / 2, from + r * token, width * sizeof *from);
    if (rows % ROWS) memset(to + rows * width / 2, 0, (ROWS - rows % ROWS) * width / 2 * sizeof *to);
}

/* Block `d` of up to 8 rows of a product, each × its scale. */
static void put_rows(uint16_t *to, Tile rows, const float *scales, long token, long count, long d, long width) {
    for (long r = 0; r < ROWS && r < count; r++)
        for (long b = 2 * d; b < 2 * d + 2 && b * LANES < width; b++)
            put(to + r * token, rows[r][b % 2] * scales[r], 0, width, b, 1);
}

static const float ONES[ROWS] = {1, 1, 1, 1, 1, 1, 1, 1};

/* ---- forward ---- */

/* Row r of `scores`, of query i, with its bias, in the unit of scores; those of no key become −∞. */
static inline void finish_scores(Tile *scores, long r, const uint16_t *bias, const Run *run, long i) {
    long n = run->length;
    for (long b = bias ? 0 : n / LANES; b < 2 * wide(n); b++) {
        Floats *x = &scores[b / 2][r][b % 2];
        Ints there = (Ints)(PLACES + (uint32_t)(b * LANES) < (uint32_t)n);
        if (bias && b * LANES < n) *x += get(bias, i, n, b, 1, 0) / run->scale;
        *x = either(there, *x, (Floats){0} - INFINITY);
    }
}

/* One head of one text: keys `as_columns`, values `as_pairs`. `sums`, where gradients will be asked for, takes the
   logarithm of each row's exponentials. */
static void head_forward(const uint16_t *q, const uint32_t *keys, const uint32_t *values, uint16_t *out, float *sums,
                         const uint16_t *bias, const Run *run, uint64_t head) {
    long n = run->length, blocks = wide(n), pairs = run->width / 2, token = run->heads * run->values;
    _Alignas(64) uint32_t rows[ROWS * pairs], probs[ROWS][blocks * LANES];
    Tile scores[blocks], found;
    float shares[ROWS] = {0};
    memset(probs, 0, sizeof probs);
    for (long i = 0; i < n; i += ROWS) {
        as_rows(rows, q + i * run->q_token, run->q_token, n - i < ROWS ? n - i : ROWS, run->width);
        for (long w = 0; w < blocks; w++) tile(scores[w], NULL, rows, pairs, 1, keys + w * pairs * COLUMNS, pairs);
        for (long r = 0; r < ROWS && i + r < n; r++) {
            Floats high = (Floats){0} - INFINITY, total = {0};
            finish_scores(scores, r, bias, run, i + r);
            for (long w = 0; w < blocks; w++) high = larger(larger(scores[w][r][0], scores[w][r][1]), high);
            float most = largest(high) * run->scale;
            uint64_t row = run->drop ? key(run->seed, head + (i + r) * run->heads) : 0;
            for (long b = 0; b < 2 * blocks; b++) {
                Floats x = exponential(scores[b / 2][r][b % 2] * run->scale - most);
                total += x;
                if (run->drop) x = where(kept(row, b, run->drop), x);
                Halves small = narrow(x);
                memcpy(probs[r] + b * LANES / 2, &small, sizeof small);
            }
            float all = sum(total);
            shares[r] = run->rescale / all;
            if (sums) sums[(i + r) * run->heads] = most + logf(all);
        }
        for (long d = 0; d < wide(run->values); d++) {
            const uint32_t *block = values + d * blocks * LANES * COLUMNS;
            tile(found, NULL, probs[0], blocks * LANES, 1, block, blocks * LANES);
            put_rows(out + i * token, found, shares, token, n - i, d, run->values);
        }
    }
}

void attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out, float *sums, const uint16_t *bias,
               const Run *run) {
    long n = run->length, blocks = wide(n), others = run->heads / run->groups;
#pragma omp parallel for schedule(static)
    for (long i = 0; i < run->texts * others; i++) {
        long token = run->first + i / others * n, other = i % others;
        _Alignas(64) uint32_t keys[blocks * run->width / 2 * COLUMNS], values[wide(run->values) * blocks * LANES * COLUMNS];
        as_columns(keys, k + token * run->k_token + other * run->k_head, run->k_token, n, run->width);
        as_pairs(values, v + token * run->v_token + other * run->v_head, run->v_token, n, run->values);
        for (long h = other * run->groups; h < (other + 1) * run->groups; h++) {
            long head = token * run->heads + h;
            head_forward(q + token * run->q_token + h * run->q_head, keys, values, out + head * run->values,
                         sums ? sums + head : NULL, bias, run, head);
        }
    }
}

/* ---- backward: rows are keys and columns queries, so that what belongs to a query lies in a lane ---- */

/* What the gradients of 32 queries take: their rows as columns and in pairs, and of each query the logarithm, the sum of
   its output × gradient, which is that of its probabilities × their gradients, and the key of its random words. */
typedef struct {
    uint32_t *q, *grad, *q_pairs, *grad_pairs;
    Floats logs[2], along[2];
    Words low[2], high[2];
} Queries;

static void prepare(Queries *to, const uint16_t *q, const uint16_t *grad, const uint16_t *out, const float *sums,
                    const Run *run, uint64_t head, long first, long count) {
    long token = run->heads * run->values;
    as_columns(to->q, q + first * run->q_token, run->q_token, count, run->width);
    as_pairs(to->q_pairs, q + first * run->q_token, run->q_token, count, run->width);
    as_columns(to->grad, grad + first * token, token, count, run->values);
    as_pairs(to->grad_pairs, grad + first * token, token, count, run->values);
    for (long c = 0; c < COLUMNS; c++) {
        uint64_t row = run->drop ? key(run->seed, head + (first + c) * run->heads) : 0;
        Floats total = {0};
        for (long d = 0; c < count && d < run->values; d += LANES) {
            long at = (first + c) * token + d;
            total += (Floats)(take(grad + at, run->values - d) << 16) * (Floats)(take(out + at, run->values - d) << 16);
        }
        to->logs[c / LANES][c % LANES] = c < count ? sums[(first + c) * run->heads] : INFINITY;
        to->along[c / LANES][c % LANES] = sum(total);
        to->low[c / LANES][c % LANES] = (uint32_t)row;
        to->high[c / LANES][c % LANES] = (uint32_t)(row >> 32);
    }
}

/* The gradients of one head's queries, and, added to what is there, of its keys and values: [blocks of numbers][tiles].
   Keys and values lie in rows, keys in pairs too. `bias` is that of queries for each key. */
static void head_backward(const uint16_t *q, const uint32_t *keys, const uint32_t *key_pairs, const uint32_t *values,
                          const uint16_t *grad, const uint16_t *out, const float *sums, const uint16_t *bias,
                          const Run *run, uint64_t head, uint16_t *grad_q, Tile *grad_k, Tile *grad_v) {
    long n = run->length, inner = wide(n) * LANES, width = run->width, pairs = width / 2, pairs_v = run->values / 2;
    long deep = wide(width), deep_v = wide(run->values);
    _Alignas(64) uint32_t q_columns[pairs * COLUMNS], grad_columns[pairs_v * COLUMNS], by_query[inner][COLUMNS];
    _Alignas(64) uint32_t q_pairs[deep * LANES * COLUMNS], grad_pairs[deep_v * LANES * COLUMNS];
    Queries of = {q_columns, grad_columns, q_pairs, grad_pairs};
    for (long first = 0; first < n; first += COLUMNS) {
        long count = n - first < COLUMNS ? n - first : COLUMNS;
        prepare(&of, q, grad, out, sums, run, head, first, count);
        memset(by_query, 0, sizeof by_query);
        for (long k = 0; k < n; k += ROWS) {
            Halves seen[ROWS][2], slopes[ROWS][2];
            Tile scores, grads;
            tile(scores, NULL, keys + k * pairs, pairs, 1, q_columns, pairs);
            tile(grads, NULL, values + k * pairs_v, pairs_v, 1, grad_columns, pairs_v);
            memset(seen, 0, sizeof seen);
            memset(slopes, 0, sizeof slopes);
            for (long r = 0; r < ROWS && k + r < n; r++)
                for (long b = 0; b < 2; b++) {
                    Floats x = scores[r][b] * run->scale - of.logs[b];
                    if (bias && first + b * LANES < n) x += get(bias, k + r, n, first / LANES + b, 1, 0);
                    Floats p = exponential(x), s = p;
                    if (run->drop)
                        s = where(kept_at((Words){0} + (uint32_t)(k + r), of.low[b], of.high[b], run->drop), p * run->rescale);
                    seen[r][b] = narrow(s);
                    slopes[r][b] = narrow((s * grads[r][b] - p * of.along[b]) * run->scale);
                }
            for (long r = 0; r < ROWS; r += 2)
                for (long b = 0; b < 2; b++) {
                    Words pair = __builtin_convertvector(slopes[r][b], Words);
                    pair |= __builtin_convertvector(slopes[r + 1][b], Words) << 16;
                    memcpy(by_query[(k + r) / 2] + b * LANES, &pair, sizeof pair);
                }
            Tile *for_k = grad_k + k / ROWS * deep, *for_v = grad_v + k / ROWS * deep_v;
            for (long d = 0; d < deep; d++)
                tile(for_k[d], for_k[d], (uint32_t *)slopes, LANES, 1, q_pairs + d * LANES * COLUMNS, LANES);
            for (long d = 0; d < deep_v; d++)
                tile(for_v[d], for_v[d], (uint32_t *)seen, LANES, 1, grad_pairs + d * LANES * COLUMNS, LANES);
        }
        for (long i = 0; i < count; i += ROWS)
            for (long d = 0; d < deep; d++) {
                Tile found;
                tile(found, NULL, by_query[0] + i, 1, COLUMNS, key_pairs + d * inner * COLUMNS, inner);
                put_rows(grad_q + (first + i) * run->heads * width, found, ONES, run->heads * width, n - first - i, d, width);
            }
    }
}

void attention_backward(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *out, const float *sums,
                        const uint16_t *grad, uint16_t *grad_q, uint16_t *grad_k, uint16_t *grad_v, const uint16_t *bias,
                        const Run *run) {
    long n = run->length, others = run->heads / run->groups, width = run->width, values = run->values;
    long eights = (n + ROWS - 1) / ROWS, deep = wide(width), deep_v = wide(values);
#pragma omp parallel for schedule(static)
    for (long i = 0; i < run->texts * others; i++) {
        long token = run->first + i / others * n, other = i % others;
        const uint16_t *key = k + token * run->k_token + other * run->k_head;
        const uint16_t *value = v + token * run->v_token + other * run->v_head;
        _Alignas(64) uint32_t key_pairs[deep * wide(n) * LANES * COLUMNS];
        uint32_t keys[eights * ROWS * width / 2], value_rows[eights * ROWS * values / 2];
        Tile for_k[eights * deep], for_v[eights * deep_v];
        as_pairs(key_pairs, key, run->k_token, n, width);
        as_rows(keys, key, run->k_token, n, width);
        as_rows(value_rows, value, run->v_token, n, values);
        memset(for_k, 0, sizeof for_k);
        memset(for_v, 0, sizeof for_v);
        for (long h = other * run->groups; h < (other + 1) * run->groups; h++) {
            long head = token * run->heads + h;
            head_backward(q + token * run->q_token + h * run->q_head, keys, key_pairs, value_rows, grad + head * values,
                          out + head * values, sums + head, bias, run, head, grad_q + head * width, for_k, for_v);
        }
        for (long r = 0; r < eights; r++) {
            long at = (token + r * ROWS) * others + other;
            for (long d = 0; d < deep; d++)
                put_rows(grad_k + at * width, for_k[r * deep + d], ONES, others * width, n - r * ROWS, d, width);
            for (long d = 0; d < deep_v; d++)
                put_rows(grad_v + at * values, for_v[r * deep_v + d], ONES, others * values, n - r * ROWS, d, values);
        }
    }
}
