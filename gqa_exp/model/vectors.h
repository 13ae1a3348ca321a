// What the kernels with AVX-512 share: bfloat16 read and written as vectors of 16 float32.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common.h"

namespace {

// Whether to fetch from memory more eagerly than AMD's processors need, and into both caches: what comes into the second
// alone, those with AMX, which are Intel's, wait for.
#ifdef __AMX_BF16__
constexpr bool kEager = true;
#else
constexpr bool kEager = false;
#endif

inline __m512 widen(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 widen(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// Only some of the 16; the others are zero and not read.
inline __m512 widen(const float* p, __mmask16 some) { return _mm512_maskz_loadu_ps(some, p); }
inline __m512 widen(const BFloat16* p, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16));
}
inline void narrow(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
inline void narrow(BFloat16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
// Only some of the 16.
inline void narrow(float* p, __m512 x, __mmask16 some) { _mm512_mask_storeu_ps(p, some, x); }
inline void narrow(BFloat16* p, __m512 x, __mmask16 some) {
  _mm256_mask_storeu_epi16(p, some, (__m256i)_mm512_cvtneps_pbh(x));
}

// e^x, with a relative error of 4e-6 at most; 0 below the least float32, infinity from 88.8 on; NaN of infinity.
inline __m512 exponential(__m512 x) {
  const __m512 power = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-1e4f), x), _mm512_set1_ps(1.44269504f));  // of 2
  const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(power, whole);
  __m512 sum = _mm512_set1_ps(1.33335581e-3f);  // Taylor's series of 2^r, |r| <= 1/2: ln(2)^n / n! for n = 5, ..., 0
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(9.61812911e-3f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(5.55041087e-2f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(2.40226507e-1f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(6.93147181e-1f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

// 16 rows of 16 words of 32 bits become columns.
inline void turn(const __m512i rows[16], __m512i columns[16]) {
  __m512i pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // lane n of fours[i + c]: column 4 n + c of rows i to i + 3
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
    columns[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    columns[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    columns[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    columns[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

}  // namespace
