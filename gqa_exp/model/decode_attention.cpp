// Attention of one query position per sequence over cached keys and values, at the speed at which memory is read.
//
// A key/value head is read once for all of its R queries: keys sixteen at a time, then values. Only where there are
// fewer heads than threads, as for MQA of one sequence, do threads share a head's queries. Scores and sums are float32.
// Compiled by native.py for the processor it runs on; needs AVX-512 with bfloat16.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr long kKeys = 16;  // keys whose scores fill one vector
constexpr long kFewQueries = 3;  // queries up to which turning the keys costs more than it saves
constexpr long kAhead = 2048;  // bytes to prefetch ahead; 1 to 8 KiB measured the same, without it 10 % less
constexpr long kFarAhead = 6144;  // if eager, into the second cache: 11 to 15 % faster; up to 34 KiB the same

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using Chunk = __m512;
  static constexpr int size = 16;
  static Chunk load(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 dot(__m512 sum, Chunk a, Chunk b) { return _mm512_fmadd_ps(a, b, sum); }
  static Chunk of(__m512i words) { return _mm512_castsi512_ps(words); }
};

template <>
struct Lanes<BFloat16> {
  using Chunk = __m512bh;
  static constexpr int size = 32;
  static Chunk load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512 dot(__m512 sum, Chunk a, Chunk b) { return _mm512_dpbf16_ps(sum, a, b); }
  static Chunk of(__m512i words) { return (__m512bh)words; }
};

// The sum of each of 16 vectors, as one vector: a tree of additions of interleaved halves.
inline __m512 sums_of(const __m512 v[16]) {
  __m512 pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i)
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                       _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

template <typename T>
void prefetch(const T* from, long count) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (long i = 0; i < count * static_cast<long>(sizeof(T)); i += kLine) {
    _mm_prefetch(bytes + i + kAhead, _MM_HINT_T0);
    if constexpr (kEager) _mm_prefetch(bytes + i + kFarAhead, _MM_HINT_T1);
  }
}

// Scores of 16 keys, turned, with as many queries as have room in registers.
template <typename T, int Words, int Queries>
void score_turned(const std::int32_t* queries, const __m512i* columns, float* scores, long stride) {
  using L = Lanes<T>;
  __m512 sums[Queries][2];  // two each, so that no addition waits for the one before
  for (auto& query : sums) query[0] = query[1] = _mm512_setzero_ps();
  for (int w = 0; w < Words; w += 2)
#pragma GCC unroll 8
    for (int r = 0; r < Queries; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        sums[r][i] =
            L::dot(sums[r][i], L::of(columns[w + i]), L::of(_mm512_set1_epi32(queries[r * Words + w + i])));
  for (int r = 0; r < Queries; ++r) _mm512_storeu_ps(scores + r * stride, _mm512_add_ps(sums[r][0], sums[r][1]));
}

// scores[r][s] = q[r] . k[s] for many queries: keys are turned, sixteen at a time, so that no sum runs across a vector.
template <typename T, int K>
void score_many(const T* queries, const T* keys, long R, long end, float* scores, long stride) {
  constexpr int words = K * sizeof(T) / sizeof(std::int32_t);
  const auto* query_words = reinterpret_cast<const std::int32_t*>(queries);
  __m512i columns[words];
  for (long s = 0; s < end; s += kKeys) {
    prefetch(keys + s * K, kKeys * K);
    for (int w = 0; w < words; w += 16) {
      __m512i rows[16];
      for (long j = 0; j < kKeys; ++j)
        rows[j] = _mm512_loadu_si512(reinterpret_cast<const std::int32_t*>(keys + std::min(s + j, end - 1) * K) + w);
      turn(rows, columns + w);
    }
    long r = 0;
    for (; r + 8 <= R; r += 8)
      score_turned<T, words, 8>(query_words + r * words, columns, scores + r * stride + s, stride);
    for (; r + 4 <= R; r += 4)
      score_turned<T, words, 4>(query_words + r * words, columns, scores + r * stride + s, stride);
    for (; r < R; ++r) score_turned<T, words, 1>(query_words + r * words, columns, scores + r * stride + s, stride);
  }
}

// scores[r][s] = q[r] . k[s] for few queries
template <typename T, int K>
void score_few(const T* queries, const T* keys, long R, long end, float* scores, long stride) {
  using L = Lanes<T>;
  constexpr int chunks = K / L::size;
  for (long s = 0; s < end; s += kKeys) {
    prefetch(keys + s * K, kKeys * K);
    for (long r = 0; r < R; ++r) {
      typename L::Chunk query[chunks];
      for (int i = 0; i < chunks; ++i) query[i] = L::load(queries + r * K + i * L::size);
      __m512 products[kKeys];
      for (long j = 0; j < kKeys; ++j) {
        const T* key = keys + std::min(s + j, end - 1) * K;
        products[j] = _mm512_setzero_ps();
        for (int i = 0; i < chunks; ++i) products[j] = L::dot(products[j], L::load(key + i * L::size), query[i]);
      }
      _mm512_storeu_ps(scores + r * stride + s, sums_of(products));
    }
  }
}

// out[r] = sum over s of weights[r][s] v[s], for as many queries as have room in registers
template <typename T, int K, int Queries>
void mix(const float* weights, long stride, const T* values, long end, T* out) {
  constexpr int vectors = K / 16;
  __m512 sums[Queries][vectors];
  for (auto& query : sums)
    for (auto& sum : query) sum = _mm512_setzero_ps();
  for (long s = 0; s < end; ++s) {
    prefetch(values + s * K, K);
    __m512 value[vectors];
    for (int i = 0; i < vectors; ++i) value[i] = widen(values + s * K + 16 * i);
    for (int r = 0; r < Queries; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[r * stride + s]);
      for (int i = 0; i < vectors; ++i) sums[r][i] = _mm512_fmadd_ps(weight, value[i], sums[r][i]);
    }
  }
  for (int r = 0; r < Queries; ++r)
    for (int i = 0; i < vectors; ++i) narrow(out + r * K + 16 * i, sums[r][i]);
}

template <typename T, int K>
void attend(const T* q, const T* k, const T* v, const T* bias, T* out, const long* sizes) {
  const long B = sizes[0], G = sizes[1], R = sizes[2], end = sizes[3];
  const long q_batch = sizes[4], head = sizes[5];  // elements between sequences of q, and between KV heads of k and v
  const long bias_batch = sizes[6], bias_group = sizes[7], bias_query = sizes[8];
  const long stride = (end + kKeys - 1) / kKeys * kKeys + kKeys;  // a line more, or all rows share a cache set
  constexpr int at_once = K <= 64 ? 4 : 2;
  const long threads = omp_get_max_threads();
  const long sharers = std::min(R, std::max(1L, threads / std::max(1L, B * G))), part = (R + sharers - 1) / sharers;
  const long parts = (R + part - 1) / part;  // of a head's queries, each of `part` or, the last, fewer
#pragma omp parallel
  {
    std::vector<float> scores(part * stride);
#pragma omp for schedule(static)
    for (long unit = 0; unit < B * G * parts; ++unit) {
      const long pair = unit / parts, b = pair / G, g = pair % G;
      const long first = unit % parts * part, queries = std::min(part, R - first);
      const T* values = v + pair * head;
      T* mixed = out + (pair * R + first) * K;
      const auto score = queries > kFewQueries ? score_many<T, K> : score_few<T, K>;
      score(q + b * q_batch + (g * R + first) * K, k + pair * head, queries, end, scores.data(), stride);
      for (long r = 0; r < queries; ++r)
        softmax<T>(scores.data() + r * stride,
                   bias ? bias + b * bias_batch + g * bias_group + (first + r) * bias_query : nullptr, end);
      long r = 0;
      for (; r + at_once <= queries; r += at_once)
        mix<T, K, at_once>(scores.data() + r * stride, stride, values, end, mixed + r * K);
      for (; r < queries; ++r) mix<T, K, 1>(scores.data() + r * stride, stride, values, end, mixed + r * K);
    }
  }
}

}  // namespace

#define EXPORT(name, T, K)                                                                              \
  extern "C" void name(const T* q, const T* k, const T* v, const T* bias, T* out, const long* sizes) { \
    attend<T, K>(q, k, v, bias, out, sizes);                                                            \
  }
EXPORT(float32_32, float, 32)
EXPORT(float32_64, float, 64)
EXPORT(float32_128, float, 128)
EXPORT(bfloat16_32, BFloat16, 32)
EXPORT(bfloat16_64, BFloat16, 64)
EXPORT(bfloat16_128, BFloat16, 128)
