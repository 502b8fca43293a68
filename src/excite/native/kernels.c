/* The passes of attention over channels-last maps, for processors with AVX-512.
 *
 * Compiled twice, for maps of float32 and (with EXCITE_BF16) of bfloat16; all arithmetic is in float32. A map is
 * u[n][position][channel]. Every sum is taken in an order that depends on the shapes and the number of threads alone,
 * so that a repeat gives the same bits.
 */
#include "maps.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum { IDENTITY, RELU, SIGMOID, HARD_SIGMOID, TANH, SILU, HARD_SWISH, RELU6 };

static inline float activated(float v, int kind) {
    switch (kind) {
    case RELU: return v > 0 ? v : 0;
    case SIGMOID: return 1 / (1 + expf(-v));
    case HARD_SIGMOID: return fminf(fmaxf(v / 6 + 0.5f, 0), 1);
    case TANH: return tanhf(v);
    case SILU: return v / (1 + expf(-v));
    case HARD_SWISH: return v * fminf(fmaxf(v / 6 + 0.5f, 0), 1);
    case RELU6: return fminf(fmaxf(v, 0), 6);
    default: return v;
    }
}

/* Sums over positions, added to what sums[channels] holds. channels is a multiple of 16. */
static void add_sums(const map_t *u, float *sums, long positions, long channels) {
    for (long c = 0; c < channels; c += 64) {
        long wide = channels - c < 64 ? channels - c : 64;
        __m512 acc[4];
        for (int k = 0; k < 4; k++) acc[k] = _mm512_setzero_ps();
        if (wide == 64) {
            for (long p = 0; p < positions; p++)
                for (int k = 0; k < 4; k++) acc[k] = _mm512_add_ps(acc[k], load16(u + p * channels + c + 16 * k));
        } else {
            for (long p = 0; p < positions; p++)
                for (int k = 0; 16 * k < wide; k++)
                    acc[k] = _mm512_add_ps(acc[k], load16(u + p * channels + c + 16 * k));
        }
        for (int k = 0; 16 * k < wide; k++)
            _mm512_storeu_ps(sums + c + 16 * k, _mm512_add_ps(_mm512_loadu_ps(sums + c + 16 * k), acc[k]));
    }
}

/* eˣ to the last bit or two: 2ⁿ times a polynomial for the rest, of at most ½ ln 2. */
static inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int k = 0; k < 7; k++) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(factors[k]));
    return _mm512_scalef_ps(sum, n);
}

static inline __m512 activated16(__m512 x, int kind) {
    if (kind == IDENTITY) return x;
    if (kind == RELU) return _mm512_max_ps(_mm512_setzero_ps(), x);
    if (kind == SIGMOID) {
        __m512 one = _mm512_set1_ps(1);
        __m512 s = _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
        return _mm512_mask_mov_ps(s, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x); /* NaN stays NaN */
    }
    float values[16];
    _mm512_storeu_ps(values, x);
    for (int l = 0; l < 16; l++) values[l] = activated(values[l], kind);
    return _mm512_loadu_ps(values);
}

/* Called by all threads of a team: y[n][out] = factor * activation(x[n][in] * w + bias). w is [out / 16][in][16] and
 * bias [out / 16][16], with zeros for what is missing to whole blocks: what a thread reads lies in one piece. */
static void layer_in_team(const float *x, const map_t *w, const float *bias, float *y, long n, long in, long out,
                          int activation, float factor) {
    long blocks = (out + 15) / 16, threads = omp_get_num_threads();
    long pieces = blocks < threads ? blocks : threads;
#pragma omp for schedule(static)
    for (long piece = 0; piece < pieces; piece++) {
        long end = blocks * (piece + 1) / pieces;
        for (long first = blocks * piece / pieces; first < end; first += 4) {
            int count = end - first < 4 ? (int)(end - first) : 4;
            for (long i = 0; i < n; i++) {
                const float *from = x + i * in;
                __m512 acc[4];
                for (int k = 0; k < 4; k++) acc[k] = _mm512_loadu_ps(bias + 16 * (first + (k < count ? k : 0)));
                if (count == 4) {
                    const map_t *row = w + first * in * 16;
                    for (long j = 0; j < in; j++) {
                        __m512 value = _mm512_set1_ps(from[j]);
                        for (int k = 0; k < 4; k++)
                            acc[k] = _mm512_fmadd_ps(value, load16(row + (k * in + j) * 16), acc[k]);
                    }
                } else {
                    for (int k = 0; k < count; k++)
                        for (long j = 0; j < in; j++)
                            acc[k] = _mm512_fmadd_ps(_mm512_set1_ps(from[j]),
                                                     load16(w + ((first + k) * in + j) * 16), acc[k]);
                }
                for (int k = 0; k < count; k++) {
                    long at = 16 * (first + k), left = out - at;
                    __m512 value = _mm512_mul_ps(_mm512_set1_ps(factor), activated16(acc[k], activation));
                    _mm512_mask_storeu_ps(y + i * out + at, left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1), value);
                }
            }
        }
    }
}

/* The layers between a squeeze and its gates: channels to hidden to out. Weights are of the maps' type. */
typedef struct {
    const map_t *reduce, *expand;
    const float *reduce_bias, *expand_bias;
    long channels, hidden, out;
    int activation, function;
    float factor;
} excitation_t;

/* Called by all threads of a team: gates[n][out] from sums[n][parts][channels] over positions. middle holds
 * n * (channels + hidden). */
static void excite_in_team(const excitation_t *e, const float *sums, long parts, long n, long positions, float *gates,
                           float *middle) {
    long channels = e->channels, blocks = channels / 16;
    float *means = middle, *small = middle + n * channels;
#pragma omp for collapse(2) schedule(static)
    for (long i = 0; i < n; i++)
        for (long b = 0; b < blocks; b++) {
            const float *from = sums + i * parts * channels + 16 * b;
            __m512 sum = _mm512_setzero_ps();
            for (long k = 0; k < parts; k++) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + k * channels));
            _mm512_storeu_ps(means + i * channels + 16 * b, _mm512_div_ps(sum, _mm512_set1_ps((float)positions)));
        }
    layer_in_team(means, e->reduce, e->reduce_bias, small, n, channels, e->hidden, e->activation, 1);
    layer_in_team(small, e->expand, e->expand_bias, gates, n, e->hidden, e->out, e->function, e->factor);
}

/* Gates gate[n][out] of one map or of the sum of two: mean over positions, reduce, activation, expand, gate function.
 * scratch holds n * ((pieces + 1) * channels + hidden). */
void gate(const map_t *u, const map_t *v, long n, long positions, long channels, const map_t *reduce,
          const float *reduce_bias, long hidden, int activation, const map_t *expand, const float *expand_bias,
          long out, int function, float factor, float *gates, float *scratch, long pieces) {
    excitation_t e = {reduce, expand, reduce_bias, expand_bias, channels, hidden, out, activation, function, factor};
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (long i = 0; i < n; i++)
            for (long k = 0; k < pieces; k++) {
                long begin = positions * k / pieces, end = positions * (k + 1) / pieces;
                float *own = scratch + (i * pieces + k) * channels;
                memset(own, 0, channels * sizeof(float));
                add_sums(u + (i * positions + begin) * channels, own, end - begin, channels);
                if (v) add_sums(v + (i * positions + begin) * channels, own, end - begin, channels);
            }
        excite_in_team(&e, scratch, pieces, n, positions, gates, scratch + n * pieces * channels);
    }
}

/* answer = gate * u + x, or gate * u where x is NULL; with relu of that. answer may be u or x. NaN stays NaN: of two
 * operands of which one is NaN, max answers with the second. */
void scale(const map_t *u, const float *gates, const map_t *x, map_t *answer, long n, long positions, long channels,
           int relu) {
    __m512 zero = _mm512_setzero_ps();
#pragma omp parallel for schedule(static)
    for (long row = 0; row < n * positions; row++) {
        const float *own = gates + row / positions * channels;
        const map_t *from = u + row * channels, *other = x ? x + row * channels : NULL;
        map_t *to = answer + row * channels;
        for (long c = 0; c < channels; c += 16) {
            __m512 value = _mm512_mul_ps(load16(from + c), _mm512_loadu_ps(own + c));
            if (other) value = _mm512_add_ps(value, load16(other + c));
            if (relu) value = _mm512_max_ps(zero, value);
            store16(to + c, value);
        }
    }
}

/* Called by all threads of a team: answer = v + gate * (u - v). answer may be u or v. */
static void select_in_team(const map_t *u, const map_t *v, const float *gates, map_t *answer, long n, long positions,
                           long channels) {
#pragma omp for schedule(static)
    for (long row = 0; row < n * positions; row++) {
        const float *own = gates + row / positions * channels;
        const map_t *first = u + row * channels, *second = v + row * channels;
        map_t *to = answer + row * channels;
        for (long c = 0; c < channels; c += 16) {
            __m512 b = load16(second + c), a = load16(first + c);
            store16(to + c, _mm512_fmadd_ps(_mm512_loadu_ps(own + c), _mm512_sub_ps(a, b), b));
        }
    }
}

void select_two(const map_t *u, const map_t *v, const float *gates, map_t *answer, long n, long positions,
                long channels) {
#pragma omp parallel
    select_in_team(u, v, gates, answer, n, positions, channels);
}

/* Grouped convolutions with as many channels out as in; a group has 4, 8 or a multiple of 16 of them.
 *
 * A vector holds 16 output channels. With 4 or 8 channels to a group that is 4 or 2 whole groups, and one input vector
 * serves all of them: its j-th channel of each group is spread over that group's lanes. With more, one input channel
 * is spread over all lanes. Of bfloat16, two input channels go in one step.
 *
 * weight is [channels / 16][rows][columns][group][16] in float32: for output channel 16 b + l and the j-th input
 * channel of its group; in bfloat16 [channels / 16][rows][columns][group / 2][16][2].
 *
 * Of a map with many channels the same 16 of neighbouring positions lie far apart, in few sets of the first cache. So
 * a few rows of them are laid out side by side first, with zeros around them: no position is special then.
 */
#define LAID_OUT_BYTES (32 * 1024)

#ifdef EXCITE_BF16
typedef uint16_t weight_t;
#define PER_STEP 2
#else
typedef float weight_t;
#define PER_STEP 1
#endif

typedef struct {
    const weight_t *weight;
    const float *bias;
    long height, width, channels, group, rows, columns, stride, dilation, pad_h, pad_w, out_h, out_w;
    int relu;
} grouped_t;

static long together(const grouped_t *g) { return g->group < 16 ? 16 : g->group; }

static int tile_of(const grouped_t *g) { return g->out_w % 14 == 0 ? 14 : g->out_w % 7 == 0 ? 7 : 8; }

/* Positions of a laid-out row: what whole tiles of outputs take. */
static long laid_out_width(const grouped_t *g) {
    long tile = tile_of(g), tiles = (g->out_w + tile - 1) / tile;
    return (tiles * tile - 1) * g->stride + (g->columns - 1) * g->dilation + 1;
}

static long laid_out_rows(const grouped_t *g, long chunk) {
    return (chunk - 1) * g->stride + (g->rows - 1) * g->dilation + 1;
}

static long laid_out_bytes(const grouped_t *g, long chunk) {
    return (laid_out_rows(g, chunk) * laid_out_width(g) * together(g) * sizeof(map_t) + 63) / 64 * 64;
}

static long chunk_of(const grouped_t *g) {
    long chunk = 1;
    while (chunk < g->out_h && laid_out_bytes(g, chunk + 1) <= LAID_OUT_BYTES) chunk++;
    return chunk;
}

static void lay_out(const grouped_t *g, const map_t *x, long first_channel, long top, long high, map_t *laid_out) {
    long wide = laid_out_width(g), block = together(g);
    for (long r = 0; r < high; r++) {
        map_t *to = laid_out + r * wide * block;
        long ih = top + r, begin = g->pad_w, end = g->pad_w + g->width < wide ? g->pad_w + g->width : wide;
        if (ih < 0 || ih >= g->height) begin = end = wide;
        if (begin > wide) begin = end = wide;
        memset(to, 0, begin * block * sizeof(map_t));
        const map_t *from = x + ((ih * g->width - g->pad_w) * g->channels + first_channel);
        for (long p = begin; p < end; p++) {
            if (block == 16)
                memcpy(to + p * 16, from + p * g->channels, 16 * sizeof(map_t));
            else
                memcpy(to + p * block, from + p * g->channels, block * sizeof(map_t));
        }
        memset(to + end * block, 0, (wide - end) * block * sizeof(map_t));
    }
}

/* One tile of outputs: acc[t] += what a tap gives, for all its input channels. */
static inline __attribute__((always_inline)) void tap(__m512 *acc, const map_t *from, const weight_t *w, long step,
                                                      int group, int tile, long block, const __m512i *lanes) {
    if (group < 16) {
#ifdef EXCITE_BF16
        __m512i weights[4];
#pragma GCC unroll 4
        for (int j = 0; j < group / 2; j++) weights[j] = _mm512_loadu_si512(w + 32 * j);
#pragma GCC unroll 14
        for (int t = 0; t < tile; t++) {
            __m512i value = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(from + t * step)));
#pragma GCC unroll 4
            for (int j = 0; j < group / 2; j++)
                acc[t] = _mm512_dpbf16_ps(acc[t], (__m512bh)_mm512_permutexvar_epi32(lanes[j], value),
                                          (__m512bh)weights[j]);
        }
#else
        __m512 weights[8];
#pragma GCC unroll 8
        for (int j = 0; j < group; j++) weights[j] = _mm512_loadu_ps(w + 16 * j);
#pragma GCC unroll 14
        for (int t = 0; t < tile; t++) {
            __m512 value = _mm512_loadu_ps(from + t * step);
#pragma GCC unroll 8
            for (int j = 0; j < group; j++) {
                __m512 one = group == 8  ? _mm512_permutexvar_ps(lanes[j], value)
                             : j == 0    ? _mm512_permute_ps(value, 0x00)
                             : j == 1    ? _mm512_permute_ps(value, 0x55)
                             : j == 2    ? _mm512_permute_ps(value, 0xAA)
                                         : _mm512_permute_ps(value, 0xFF);
                acc[t] = _mm512_fmadd_ps(one, weights[j], acc[t]);
            }
        }
#endif
    } else {
        for (long j = 0; j < block / PER_STEP; j++) {
#ifdef EXCITE_BF16
            __m512bh weights = (__m512bh)_mm512_loadu_si512(w + 32 * j);
#pragma GCC unroll 14
            for (int t = 0; t < tile; t++) {
                int pair;
                memcpy(&pair, from + t * step + 2 * j, sizeof pair);
                acc[t] = _mm512_dpbf16_ps(acc[t], (__m512bh)_mm512_set1_epi32(pair), weights);
            }
#else
            __m512 weights = _mm512_loadu_ps(w + 16 * j);
#pragma GCC unroll 14
            for (int t = 0; t < tile; t++) acc[t] = _mm512_fmadd_ps(_mm512_set1_ps(from[t * step + j]), weights, acc[t]);
#endif
        }
    }
}

/* Rows first..last of 16 output channels, from rows that are laid out. */
static inline __attribute__((always_inline)) void grouped_rows(const grouped_t *g, int group, int tile, long b,
                                                               map_t *answer, float *sums, long first, long last,
                                                               const map_t *laid_out, const __m512i *lanes) {
    __m512 zero = _mm512_setzero_ps();
    long wide = laid_out_width(g), block = group < 16 ? 16 : g->group, step = g->stride * block;
    const weight_t *own = g->weight + b * g->rows * g->columns * g->group * 16;
    __m512 start = g->bias ? _mm512_loadu_ps(g->bias + 16 * b) : zero;
    for (long oh = first; oh < last; oh++) {
        __m512 total = zero;
        map_t *to = answer + oh * g->out_w * g->channels + 16 * b;
        for (long ow = 0; ow < g->out_w; ow += tile) {
            long count = g->out_w - ow < tile ? g->out_w - ow : tile;
            __m512 acc[14];
#pragma GCC unroll 14
            for (int t = 0; t < tile; t++) acc[t] = start;
            for (long kh = 0; kh < g->rows; kh++) {
                const map_t *row = laid_out + (((oh - first) * g->stride + kh * g->dilation) * wide +
                                               ow * g->stride) * block;
                for (long kw = 0; kw < g->columns; kw++)
                    tap(acc, row + kw * g->dilation * block, own + (kh * g->columns + kw) * g->group * 16, step, group,
                        tile, block, lanes);
            }
#pragma GCC unroll 14
            for (int t = 0; t < tile; t++) {
                if (t >= count) break;
                __m512 value = g->relu ? _mm512_max_ps(zero, acc[t]) : acc[t];
                total = _mm512_add_ps(total, value);
                store16(to + (ow + t) * g->channels, value);
            }
        }
        if (sums) _mm512_storeu_ps(sums + oh * g->channels + 16 * b, total);
    }
}

#define ROWS(GROUP, TILE) grouped_rows(g, GROUP, TILE, b, answer, sums, first, last, laid_out, lanes)
#define TILES(GROUP) (tile == 14 ? ROWS(GROUP, 14) : tile == 7 ? ROWS(GROUP, 7) : ROWS(GROUP, 8))

static void grouped_block(const grouped_t *g, long b, map_t *answer, float *sums, long first, long last,
                          const map_t *laid_out, const __m512i *lanes) {
    int tile = tile_of(g);
    if (g->group == 4)
        TILES(4);
    else if (g->group == 8)
        TILES(8);
    else
        TILES(16);
}

/* Called by all threads of a team, which do not wait for each other at the end. sums[n][out_h][channels], where given,
 * takes the sums of the answers over each row. */
static void grouped_in_team(const grouped_t *g, const map_t *x, map_t *answer, float *sums, long n, map_t *laid_out) {
    long chunk = chunk_of(g), chunks = (g->out_h + chunk - 1) / chunk, block = together(g);
    long units = g->channels / block, wanted = 4 * omp_get_num_threads();
    long parts = n * chunks >= wanted ? 1 : (wanted + n * chunks - 1) / (n * chunks);
    if (parts > units) parts = units;
    __m512i lanes[8];
    for (int j = 0; j < 8; j++) {
        int place[16];
        for (int l = 0; l < 16; l++) place[l] = (int)((l / g->group * g->group) / PER_STEP + j) % 16;
        lanes[j] = _mm512_loadu_si512(place);
    }
#pragma omp for collapse(3) schedule(dynamic) nowait
    for (long i = 0; i < n; i++)
        for (long k = 0; k < chunks; k++)
            for (long part = 0; part < parts; part++) {
                long first = k * chunk, last = first + chunk < g->out_h ? first + chunk : g->out_h;
                for (long unit = units * part / parts; unit < units * (part + 1) / parts; unit++) {
                    lay_out(g, x + i * g->height * g->width * g->channels, unit * block, first * g->stride - g->pad_h,
                            laid_out_rows(g, last - first), laid_out);
                    for (long b = unit * block / 16; b < (unit + 1) * block / 16; b++)
                        grouped_block(g, b, answer + i * g->out_h * g->out_w * g->channels,
                                      sums ? sums + i * g->out_h * g->channels : NULL, first, last, laid_out, lanes);
                }
            }
}

/* Whether this was compiled for a processor that can do the two below. */
int has_grouped(void) {
#if defined(EXCITE_BF16) && !defined(__AVX512BF16__)
    return 0;
#else
    return 1;
#endif
}

/* 0, or 1 where there was no memory. */
int grouped(const map_t *x, const weight_t *weight, const float *bias, map_t *answer, long n, long height, long width,
            long channels, long group, long rows, long columns, long stride, long dilation, long pad_h, long pad_w,
            long out_h, long out_w, int relu) {
    grouped_t g = {weight, bias,   height,   width, channels, group, rows, columns,
                   stride, dilation, pad_h, pad_w, out_h,    out_w, relu};
    int failed = 0;
#pragma omp parallel
    {
        map_t *laid_out = aligned_alloc(64, laid_out_bytes(&g, chunk_of(&g)));
        if (!laid_out) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) grouped_in_team(&g, x, answer, NULL, n, laid_out);
        free(laid_out);
    }
    return failed;
}

/* For three columns of the kernel, four input channels of each group (from the j-th on) and 16 output channels: what a
 * row of answers' gradients dy adds to the gradient of the weight. */
static inline __attribute__((always_inline)) void weight_row(const grouped_t *g, const map_t *dy, const map_t *row,
                                                             float *sums, int group, int j, const __m512i *lanes) {
    __m512 acc[12];
#pragma GCC unroll 12
    for (int k = 0; k < 12; k++) acc[k] = _mm512_setzero_ps();
    for (long ow = 0; ow < g->out_w; ow++) {
        __m512 gradient = load16(dy + ow * g->channels);
#pragma GCC unroll 3
        for (int kw = 0; kw < 3; kw++) {
            __m512 value = load16(row + (ow * g->stride + kw * g->dilation) * 16);
            __m512 spread[4];
            if (group == 4) {
                spread[0] = _mm512_permute_ps(value, 0x00);
                spread[1] = _mm512_permute_ps(value, 0x55);
                spread[2] = _mm512_permute_ps(value, 0xAA);
                spread[3] = _mm512_permute_ps(value, 0xFF);
            } else {
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) spread[k] = _mm512_permutexvar_ps(lanes[j + k], value);
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) acc[4 * kw + k] = _mm512_fmadd_ps(spread[k], gradient, acc[4 * kw + k]);
        }
    }
#pragma GCC unroll 3
    for (int kw = 0; kw < 3; kw++)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            float *to = sums + (kw * group + j + k) * 16;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), acc[4 * kw + k]));
        }
}

/* The gradient of the weight of a grouped convolution with 4 or 8 channels to a group and three columns, apart for each
 * image: sums[n][channels / 16][rows][3][group][16]. 0, or 1 where there was no memory. */
int grouped_weight(const map_t *x, const map_t *dy, float *sums, long n, long height, long width, long channels,
                   long group, long rows, long columns, long stride, long dilation, long pad_h, long pad_w, long out_h,
                   long out_w) {
    grouped_t g = {NULL,   NULL,     height, width, channels, group, rows, columns,
                   stride, dilation, pad_h,  pad_w, out_h,    out_w, 0};
    long chunk = chunk_of(&g), wide = laid_out_width(&g), blocks = channels / 16, own = rows * 3 * group * 16;
    int failed = 0;
#pragma omp parallel
    {
        map_t *laid_out = aligned_alloc(64, laid_out_bytes(&g, chunk));
        __m512i lanes[8];
        for (int j = 0; j < 8; j++) {
            int place[16];
            for (int l = 0; l < 16; l++) place[l] = (int)(l / group * group + j) % 16;
            lanes[j] = _mm512_loadu_si512(place);
        }
        if (!laid_out) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for collapse(2) schedule(static)
            for (long i = 0; i < n; i++)
                for (long b = 0; b < blocks; b++) {
                    float *to = sums + (i * blocks + b) * own;
                    memset(to, 0, own * sizeof(float));
                    for (long first = 0; first < out_h; first += chunk) {
                        long last = first + chunk < out_h ? first + chunk : out_h;
                        lay_out(&g, x + i * height * width * channels, 16 * b, first * stride - pad_h,
                                laid_out_rows(&g, last - first), laid_out);
                        for (long oh = first; oh < last; oh++)
                            for (long kh = 0; kh < rows; kh++) {
                                const map_t *from = dy + (i * out_h + oh) * out_w * channels + 16 * b;
                                const map_t *row = laid_out + ((oh - first) * stride + kh * dilation) * wide * 16;
                                float *at = to + kh * 3 * group * 16;
                                if (group == 4) {
                                    weight_row(&g, from, row, at, 4, 0, lanes);
                                } else {
                                    weight_row(&g, from, row, at, 8, 0, lanes);
                                    weight_row(&g, from, row, at, 8, 4, lanes);
                                }
                            }
                    }
                }
        }
        free(laid_out);
    }
    return failed;
}

/* Selective kernels of two branches (ReLU at the end of each), from their input to their selection: split, fuse and
 * select for a few images at a time, so that what the branches answer is still in the caches when it is selected from.
 *
 * The branches differ in weight, kernel, dilation and padding. images is how many at a time; maps holds
 * 2 * images * out_h * out_w * channels, scratch images * ((2 * out_h + 2) * channels + hidden). 0, or 1 where there
 * was no memory.
 */
int selective(const map_t *x, map_t *answer, long n, long images, long height, long width, long channels, long group,
              long stride, long out_h, long out_w, const weight_t *weight1, const float *bias1, long rows1,
              long columns1, long dilation1, long pad_h1, long pad_w1, const weight_t *weight2, const float *bias2,
              long rows2, long columns2, long dilation2, long pad_h2, long pad_w2, const map_t *reduce,
              const float *reduce_bias, long hidden, int activation, const map_t *expand, const float *expand_bias,
              int function, float factor, map_t *maps, float *scratch) {
    grouped_t first = {weight1, bias1,     height, width,  channels, group, rows1, columns1,
                       stride,  dilation1, pad_h1, pad_w1, out_h,    out_w, 1};
    grouped_t second = {weight2, bias2,     height, width,  channels, group, rows2, columns2,
                        stride,  dilation2, pad_h2, pad_w2, out_h,    out_w, 1};
    excitation_t e = {reduce, expand, reduce_bias, expand_bias, channels, hidden, channels, activation, function,
                      factor};
    long positions = out_h * out_w, one = positions * channels;
    map_t *u = maps, *v = maps + images * one;
    float *sums = scratch, *gates = scratch + images * 2 * out_h * channels, *middle = gates + images * channels;
    int failed = 0;
#pragma omp parallel
    {
        long bytes = laid_out_bytes(&first, chunk_of(&first)), other = laid_out_bytes(&second, chunk_of(&second));
        map_t *laid_out = aligned_alloc(64, bytes > other ? bytes : other);
        if (!laid_out) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed)
            for (long i = 0; i < n; i += images) {
                long count = n - i < images ? n - i : images;
                const map_t *from = x + i * height * width * channels;
                for (long k = 0; k < count; k++) {
                    grouped_in_team(&first, from + k * height * width * channels, u + k * one,
                                    sums + k * 2 * out_h * channels, 1, laid_out);
                    grouped_in_team(&second, from + k * height * width * channels, v + k * one,
                                    sums + (k * 2 + 1) * out_h * channels, 1, laid_out);
                }
#pragma omp barrier
                excite_in_team(&e, sums, 2 * out_h, count, positions, gates, middle);
                select_in_team(u, v, gates, answer + i * one, count, positions, channels);
            }
        free(laid_out);
    }
    return failed;
}
