// Products of bfloat16 matrices, summed in float32, for the kernels of whole sequences.
//
// They multiply words, which are pairs of bfloat16 along the summed axis: one word of the left side at a time with 16
// of the right side that lie side by side.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "tiles.h"
#include "vectors.h"

namespace {

constexpr long kColumns = 32;  // of a product's right side at a time, two vectors
constexpr long kSkew = 16;     // words more per line of what is read in columns, or all share a set of the cache

constexpr long up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// The bits of 16 bfloat16, each in a word.
inline __m512i words_of(__m256i bits) { return _mm512_cvtepu16_epi32(bits); }
inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline __m512i pairs_of(__m512i low, __m512i high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }

struct Left {
  const Word* words;
  long row, step;  // words from one row to the next, and from one word of a row to the next
};

// A B for some rows, whose sums take as many pairs of registers, and 32 columns; lines of B are `line` words apart.
// Calls store(row, vector, sums) for each half row of the result, and meanwhile(step) before each step.
template <int Rows, typename Store, typename Meanwhile>
inline void product_tile(Left a, const Word* b, long line, long steps, Store store, Meanwhile meanwhile) {
  __m512 sums[Rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (long p = 0; p < steps; ++p) {
    meanwhile(p);
    const auto left = (__m512bh)_mm512_load_si512(b + p * line), right = (__m512bh)_mm512_load_si512(b + p * line + 16);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const auto word = (__m512bh)_mm512_set1_epi32(static_cast<int>(a.words[i * a.row + p * a.step]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, word);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], right, word);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) store(i, j, sums[i][j]);
}

}  // namespace
