/* The passes of the units' training forms over channels-last maps, for processors with AVX-512.
 *
 * Compiled twice, for maps of float32 and (with EXCITE_BF16) of bfloat16; all arithmetic is in float32. A map is
 * u[n][position][channel], with any number of channels. Behind a batch norm u = a * c + b, with one a and b a channel.
 *
 * A sum over positions is taken in float32 over each of so many pieces of an image, and of those in double: in an
 * order that depends on the shapes alone, so that a repeat gives the same bits with any number of threads. scratch
 * holds n * pieces * kinds * (channels, rounded up to whole sixteens), for so many kinds of sums as a pass takes;
 * sums[kind][n][channels] is what it answers with.
 */
#include "maps.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define WHOLE ((__mmask16)0xFFFF)

/* Of sixteen channels those that there are. */
INLINE __m512 load_some(const map_t *p, __mmask16 some) {
    if (__builtin_constant_p(some) && some == WHOLE) return load16(p);
#ifdef EXCITE_BF16
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16));
#else
    return _mm512_maskz_loadu_ps(some, p);
#endif
}

INLINE void store_some(map_t *p, __m512 v, __mmask16 some) {
    if (__builtin_constant_p(some) && some == WHOLE) {
        store16(p, v);
        return;
    }
    map_t all[16];
    store16(all, v);
    memcpy(p, all, __builtin_popcount(some) * sizeof(map_t));
}

INLINE __m512 floats(const float *p, __mmask16 some) {
    return __builtin_constant_p(some) && some == WHOLE ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(some, p);
}

INLINE void add_to(float *sum, __m512 v) { _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), v)); }

/* Where a ReLU behind a * c + b lets a gradient through: like PyTorch's, also where that is NaN. */
INLINE __mmask16 passes(__m512 c, __m512 a, __m512 b, __m512 least) {
    return _mm512_cmp_ps_mask(_mm512_fmadd_ps(c, a, b), least, _CMP_NLE_UQ);
}

/* What u has to be above: 0 for a ReLU, and where there is none, nothing. */
INLINE __m512 least_of(int has_relu) { return _mm512_set1_ps(has_relu ? 0 : -__builtin_inff()); }

/* v where on, else 0. v is loaded by then: a compiler that made one masked load of both would have it wait for on, and so
 * for another load, which halves how many are on their way. */
INLINE __m512 where(__mmask16 on, __m512 v) {
    __asm__("" : "+v"(v));
    return _mm512_maskz_mov_ps(on, v);
}

/* max answers with its second operand where one is NaN: NaN stays NaN. */
INLINE __m512 relu(__m512 v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }

static long rounded_up(long channels) { return (channels + 15) / 16 * 16; }

/* BODY(row, rows, ch, some) over rows begin..end and all channels: four rows at a time, which are read as four streams
 * while what belongs to their channels stays in registers. */
#define OVER(begin, end, channels, BODY)                                                                              \
    for (long row = (begin); row < (end);) {                                                                          \
        __mmask16 rest = (__mmask16)((1u << ((channels) % 16)) - 1);                                                  \
        long ch = 0;                                                                                                  \
        if ((end)-row >= 4) {                                                                                         \
            for (; ch + 16 <= (channels); ch += 16) BODY(row, 4, ch, WHOLE);                                          \
            if (rest) BODY(row, 4, ch, rest);                                                                         \
            row += 4;                                                                                                 \
        } else {                                                                                                      \
            for (; ch + 16 <= (channels); ch += 16) BODY(row, 1, ch, WHOLE);                                          \
            if (rest) BODY(row, 1, ch, rest);                                                                         \
            row += 1;                                                                                                 \
        }                                                                                                             \
    }

/* For every image i and piece k of it: its rows begin..end. */
#define PIECES(...)                                                                                                   \
    _Pragma("omp parallel for collapse(2) schedule(static)") for (long i = 0; i < n; i++) for (long k = 0;            \
                                                                                              k < pieces; k++) {      \
        long begin = i * positions + positions * k / pieces, end = i * positions + positions * (k + 1) / pieces;      \
        __VA_ARGS__                                                                                                   \
    }

/* The same with two branches known to the compiler, so that each has instructions of its own: processors fetch ahead by
 * instruction, and of one that reads from two maps in turn they do not know what comes next. */
#define PIECES_FOR_TWO(number, ...)                                                                                   \
    if ((number) == 2) {                                                                                              \
        enum { number = 2 };                                                                                          \
        PIECES(__VA_ARGS__)                                                                                           \
    } else {                                                                                                          \
        PIECES(__VA_ARGS__)                                                                                           \
    }

/* sums[kind][n][channels] of what the pieces of each image came to. */
static void combine(const float *scratch, float *sums, long kinds, long n, long channels, long pieces) {
    long wide = rounded_up(channels);
#pragma omp parallel for collapse(2) schedule(static)
    for (long kind = 0; kind < kinds; kind++)
        for (long i = 0; i < n; i++) {
            const float *from = scratch + (i * pieces * kinds + kind) * wide;
            for (long ch = 0; ch < channels; ch++) {
                double sum = 0;
                for (long k = 0; k < pieces; k++) sum += from[k * kinds * wide + ch];
                sums[(kind * n + i) * channels + ch] = (float)sum;
            }
        }
}

#define OWN_SUMS(kinds)                                                                                               \
    float *own = scratch + (i * pieces + k) * (kinds) * wide;                                                         \
    memset(own, 0, (kinds) * wide * sizeof(float));

/* ---- statistics ---- */

INLINE void moments_of(const map_t *c, const float *shift, float *own, long channels, long wide, int rows, long ch,
                       __mmask16 some) {
    __m512 near = floats(shift + ch, some), first = _mm512_setzero_ps(), second = first;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        __m512 d = _mm512_sub_ps(load_some(c + r * channels + ch, some), near);
        first = _mm512_add_ps(first, d);
        second = _mm512_fmadd_ps(d, d, second);
    }
    add_to(own + ch, first);
    add_to(own + wide + ch, second);
}

/* Sums of c - shift and of its square. */
void moments(const map_t *c, const float *shift, float *scratch, float *sums, long n, long positions, long channels,
             long pieces) {
    long wide = rounded_up(channels);
#define BODY(row, rows, ch, some) moments_of(c + row * channels, shift, own, channels, wide, rows, ch, some)
    PIECES(OWN_SUMS(2) OVER(begin, end, channels, BODY))
#undef BODY
    combine(scratch, sums, 2, n, channels, pieces);
}

INLINE void active_of(const map_t *c, const float *a, const float *b, const float *mean, float *own, long channels,
                      long wide, int rows, long ch, __mmask16 some) {
    __m512 slope = floats(a + ch, some), start = floats(b + ch, some), middle = floats(mean + ch, some);
    __m512 one = _mm512_set1_ps(1), count = _mm512_setzero_ps(), sum = count;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        __m512 value = load_some(c + r * channels + ch, some);
        __mmask16 on = passes(value, slope, start, _mm512_setzero_ps());
        count = _mm512_mask_add_ps(count, on, count, one);
        sum = _mm512_mask_add_ps(sum, on, sum, _mm512_sub_ps(value, middle));
    }
    add_to(own + ch, count);
    add_to(own + wide + ch, sum);
}

/* How often a * c + b is above 0, and the sums of c - mean over where it is. */
void active(const map_t *c, const float *a, const float *b, const float *mean, float *scratch, float *sums, long n,
            long positions, long channels, long pieces) {
    long wide = rounded_up(channels);
#define BODY(row, rows, ch, some) active_of(c + row * channels, a, b, mean, own, channels, wide, rows, ch, some)
    PIECES(OWN_SUMS(2) OVER(begin, end, channels, BODY))
#undef BODY
    combine(scratch, sums, 2, n, channels, pieces);
}

/* ---- relu(p * c + q + shortcut), the end of a residual branch ---- */

INLINE void join_of(const map_t *c, const map_t *shortcut, map_t *out, const float *p, const float *q, long channels,
                    int rows, long ch, __mmask16 some) {
    __m512 slope = floats(p + ch, some), start = floats(q + ch, some);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        long at = r * channels + ch;
        __m512 u = _mm512_fmadd_ps(load_some(c + at, some), slope, start);
        store_some(out + at, relu(_mm512_add_ps(u, load_some(shortcut + at, some))), some);
    }
}

/* p and q are [n][channels]. */
void join(const map_t *c, const map_t *shortcut, const float *p, const float *q, map_t *out, long n, long positions,
          long channels, long pieces) {
#define BODY(row, rows, ch, some)                                                                                     \
    join_of(c + row * channels, shortcut + row * channels, out + row * channels, p + i * channels, q + i * channels,  \
            channels, rows, ch, some)
    PIECES(OVER(begin, end, channels, BODY))
#undef BODY
}

INLINE void join_backward_of(const map_t *dy, const map_t *out, const map_t *c, const float *mean, map_t *g, float *own,
                             long channels, long wide, int rows, long ch, __mmask16 some) {
    __m512 middle = floats(mean + ch, some), first = _mm512_setzero_ps(), second = first;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        long at = r * channels + ch;
        __mmask16 on = _mm512_cmp_ps_mask(load_some(out + at, some), _mm512_setzero_ps(), _CMP_NLE_UQ);
        __m512 gradient = where(on, load_some(dy + at, some));
        store_some(g + at, gradient, some);
        first = _mm512_add_ps(first, gradient);
        second = _mm512_fmadd_ps(gradient, _mm512_sub_ps(load_some(c + at, some), middle), second);
    }
    add_to(own + ch, first);
    add_to(own + wide + ch, second);
}

/* g = dy where out is above 0; sums of g and of g * (c - mean). */
void join_backward(const map_t *dy, const map_t *out, const map_t *c, const float *mean, map_t *g, float *scratch,
                   float *sums, long n, long positions, long channels, long pieces) {
    long wide = rounded_up(channels);
#define BODY(row, rows, ch, some)                                                                                     \
    join_backward_of(dy + row * channels, out + row * channels, c + row * channels, mean, g + row * channels, own,    \
                     channels, wide, rows, ch, some)
    PIECES(OWN_SUMS(2) OVER(begin, end, channels, BODY))
#undef BODY
    combine(scratch, sums, 2, n, channels, pieces);
}

/* ---- the sum over branches of factor * u, u = relu(a * c + b) or a * c + b ---- */

INLINE void select_of(const map_t *const *c, const float *const *a, const float *const *b, const float *const *factor,
                      long branches, unsigned relus, map_t *v, long first_row, long own, long channels, int rows,
                      long ch, __mmask16 some) {
    __m512 sum[4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (long m = 0; m < branches; m++) {
        __m512 slope = floats(a[m] + ch, some), start = floats(b[m] + ch, some), by = floats(factor[m] + own + ch, some);
        __m512 least = least_of(relus >> m & 1);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m512 u = _mm512_fmadd_ps(load_some(c[m] + (first_row + r) * channels + ch, some), slope, start);
            sum[r] = _mm512_fmadd_ps(_mm512_max_ps(least, u), by, sum[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) store_some(v + (first_row + r) * channels + ch, sum[r], some);
}

/* a[m] and b[m] are [channels], factor[m] is [n][channels]; a branch has a ReLU where its bit of relus is set. */
void select_sum(const map_t *const *c, const float *const *a, const float *const *b, const float *const *factor,
                long branches, int relus, map_t *v, long n, long positions, long channels, long pieces) {
#define BODY(row, rows, ch, some)                                                                                     \
    select_of(c, a, b, factor, branches, (unsigned)relus, v, row, i * channels, channels, rows, ch, some)
    PIECES_FOR_TWO(branches, OVER(begin, end, channels, BODY))
#undef BODY
}

INLINE void select_backward_of(const map_t *dv, const map_t *c, const float *a, const float *b, const float *mean,
                               int has_relu, float *own, long channels, long wide, int rows, long ch, __mmask16 some) {
    __m512 slope = floats(a + ch, some), start = floats(b + ch, some), middle = floats(mean + ch, some);
    __m512 first = _mm512_setzero_ps(), second = first;
    __m512 least = least_of(has_relu);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        __m512 value = load_some(c + r * channels + ch, some);
        __mmask16 on = passes(value, slope, start, least);
        __m512 gradient = where(on, load_some(dv + r * channels + ch, some));
        first = _mm512_add_ps(first, gradient);
        second = _mm512_fmadd_ps(gradient, _mm512_sub_ps(value, middle), second);
    }
    add_to(own + ch, first);
    add_to(own + wide + ch, second);
}

/* For every branch m the sums 2 m of dv over where its u lets a gradient through, and 2 m + 1 of dv * (c - mean). */
void select_backward(const map_t *dv, const map_t *const *c, const float *const *a, const float *const *b,
                     const float *const *mean, long branches, int relus, float *scratch, float *sums, long n,
                     long positions, long channels, long pieces) {
    long wide = rounded_up(channels);
#define BODY(row, rows, ch, some)                                                                                     \
    _Pragma("GCC unroll 2") for (long m = 0; m < branches; m++)                                                       \
    select_backward_of(dv + row * channels, c[m] + row * channels, a[m], b[m], mean[m], relus >> m & 1,               \
                       own + 2 * m * wide, channels, wide, rows, ch, some)
    PIECES_FOR_TWO(branches, OWN_SUMS(2 * branches) OVER(begin, end, channels, BODY))
#undef BODY
    combine(scratch, sums, 2 * branches, n, channels, pieces);
}

/* ---- the gradient of what goes into the batch norm ---- */

INLINE void through_of(const map_t *g, const map_t *c, const float *const *v, int has_relu, map_t *dc, long own,
                       long channels, int rows, long ch, __mmask16 some) {
    __m512 p = floats(v[0] + own + ch, some), q = floats(v[1] + own + ch, some);
    __m512 r = floats(v[2] + ch, some), t = floats(v[3] + ch, some);
    __m512 slope = floats(v[4] + ch, some), start = floats(v[5] + ch, some);
    __m512 least = least_of(has_relu);
#pragma GCC unroll 4
    for (int k = 0; k < rows; k++) {
        long at = k * channels + ch;
        __m512 value = load_some(c + at, some);
        __mmask16 on = passes(value, slope, start, least);
        __m512 du = where(on, _mm512_fmadd_ps(load_some(g + at, some), p, q));
        store_some(dc + at, _mm512_add_ps(du, _mm512_fmadd_ps(value, r, t)), some);
    }
}

/* dc = (p * g + q, where the ReLU lets it through) + r * c + t. v is p, q [n][channels], and r, t and a, b of
 * a * c + b [channels]. */
void through_norm(const map_t *g, const map_t *c, const float *const *v, int has_relu, map_t *dc, long n,
                  long positions, long channels, long pieces) {
#define BODY(row, rows, ch, some)                                                                                     \
    through_of(g + row * channels, c + row * channels, v, has_relu, dc + row * channels, i * channels, channels,      \
               rows, ch, some)
    PIECES(OVER(begin, end, channels, BODY))
#undef BODY
}
