/* Maps of float32 or (with EXCITE_BF16) of bfloat16, read and written sixteen channels at a time as float32. */
#pragma once

#include <immintrin.h>
#include <stdint.h>

#ifdef EXCITE_BF16
typedef uint16_t map_t;
static inline __m512 load16(const map_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void store16(map_t *p, __m512 v) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
#endif
}
#else
typedef float map_t;
static inline __m512 load16(const map_t *p) { return _mm512_loadu_ps(p); }
static inline void store16(map_t *p, __m512 v) { _mm512_storeu_ps(p, v); }
#endif
