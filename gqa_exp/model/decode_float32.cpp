// Decode steps in float32 for processors with AVX2 but without AVX-512 in bfloat16: what decode_linear.cpp and
// decode_attention.cpp compute, and by the same names. 16 registers of 8 numbers hold fewer sums at a time than theirs,
// so pieces of what is read from memory, small enough for the first cache, are gone through several times.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace {

constexpr long kVector = 8;  // numbers in a register

// Into a register: GCC would load it again wherever it is multiplied, and loads be the limit.
inline __m256 once(__m256 loaded) {
  asm("" : "+x"(loaded));
  return loaded;
}

// Sums of eight vectors, as one vector.
inline __m256 sums_of(const __m256 v[8]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

inline void prefetch(const float* from, long count, long ahead) {
  const char* bytes = reinterpret_cast<const char*>(from) + ahead;
  for (long i = 0; i < count * static_cast<long>(sizeof(float)); i += kLine) _mm_prefetch(bytes + i, _MM_HINT_T1);
}

// ---- products: y = norm(x) W^T, gated, plus a residual, each as asked; sizes and layouts as in decode_linear.cpp

constexpr long kOutputs = 32;  // outputs that lie together
constexpr long kRows = 2;      // rows of x at a time: their sums with these outputs are in registers
constexpr long kInputs = 64;   // of the piece of weights that stays in the first cache, 8 KiB

struct Call {
  const float *x, *norm, *weights, *residual;
  float* y;
  long rows, inputs, outputs, gated;
  float epsilon;

  // T5's norm: no mean is taken away and nothing is added (Raffel et al. 2020, section 2.1).
  float scale_of(long row) const {
    if (!norm) return 1;
    float squares = 0;
    for (long k = 0; k < inputs; ++k) squares += x[row * inputs + k] * x[row * inputs + k];
    return 1 / std::sqrt(squares / inputs + epsilon);
  }

  // From the 32 sums of a row and block to its results.
  void store(const float* sums, long row, long block) const {
    const long count = gated ? kOutputs / 2 : kOutputs, at = row * (gated ? outputs / 2 : outputs) + block * count;
#pragma omp simd
    for (long i = 0; i < count; ++i) {
      float value = sums[i];
      if (gated) {
        // gelu in tanh's approximation, see decode_linear.cpp
        const float power = std::min(80.0f, -1.5957691216057308f * (value + 0.044715f * value * value * value));
        value = value / (1 + std::exp(power)) * sums[16 + i];
      }
      y[at + i] = residual ? value + residual[at + i] : value;
    }
  }
};

// Adds the products of a piece to the sums (Rows, 32), and meanwhile fetches `share` bytes per input of a later piece.
// x: (inputs, kRows); w: (inputs, 32)
template <int Rows>
inline void multiply(const float* x, const float* w, long inputs, const char* later, long share, float* sums) {
  constexpr int vectors = kOutputs / kVector;
  __m256 totals[Rows][vectors];
  for (auto& row : totals)
    for (auto& total : row) total = _mm256_setzero_ps();
  for (long k = 0; k < inputs; ++k, later += share) {
    _mm_prefetch(later, _MM_HINT_T1);
    if (share > kLine) _mm_prefetch(later + kLine, _MM_HINT_T1);
    __m256 values[Rows];
    for (int row = 0; row < Rows; ++row) values[row] = _mm256_broadcast_ss(x + k * kRows + row);
    for (int i = 0; i < vectors; ++i) {
      const __m256 weights = once(_mm256_loadu_ps(w + k * kOutputs + i * kVector));
      for (int row = 0; row < Rows; ++row) totals[row][i] = _mm256_fmadd_ps(values[row], weights, totals[row][i]);
    }
  }
  for (int row = 0; row < Rows; ++row)
    for (int i = 0; i < vectors; ++i) {  // added once a piece: nearer to the exact result than one chain of all inputs
      float* sum = sums + row * kOutputs + i * kVector;
      _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), totals[row][i]));
    }
}

int linear(const Call& call) {
  const long rows = call.rows, inputs = call.inputs, passes = (rows + kRows - 1) / kRows;
  float* turned = scratch<float>(passes * kRows * inputs);  // (passes, inputs, kRows)
  if (!turned) return 1;
#pragma omp parallel
  {
    const Share columns(inputs / kVector), blocks(call.outputs / kOutputs);
    for (long row = 0; row < rows; ++row) {
      const float scale = call.scale_of(row);
      float* to = turned + row / kRows * kRows * inputs + row % kRows;
      for (long k = columns.begin * kVector; k < columns.end * kVector; ++k) {
        const float value = call.x[row * inputs + k];
        to[k * kRows] = call.norm ? value * scale * call.norm[k] : value;
      }
    }
    std::vector<float> sums(passes * kRows * kOutputs);
#pragma omp barrier
    for (long block = blocks.begin; block < blocks.end; ++block) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (long k = 0; k < inputs; k += kInputs) {
        const float* w = call.weights + (block * inputs + k) * kOutputs;
        const long here = std::min(kInputs, inputs - k), share = kOutputs * sizeof(float) / passes;
        const char* later = reinterpret_cast<const char*>(w + 2 * kInputs * kOutputs);
        for (long pass = 0; pass < passes; ++pass) {
          const float* x = turned + (pass * inputs + k) * kRows;
          float* to = sums.data() + pass * kRows * kOutputs;
          if (rows - pass * kRows > 1)
            multiply<2>(x, w, here, later + pass * here * share, share, to);
          else
            multiply<1>(x, w, here, later + pass * here * share, share, to);
        }
      }
      for (long row = 0; row < rows; ++row) call.store(sums.data() + row * kOutputs, row, block);
    }
  }
  return 0;
}

}  // namespace

extern "C" int linear_float32(const float* x, const float* norm, const float* weights, const float* residual, float* y,
                              const long* sizes, float epsilon) {
  return linear(Call{x, norm, weights, residual, y, sizes[0], sizes[1], sizes[2], sizes[3], epsilon});
}

// ---- attention of one query position per sequence; sizes and layouts as in decode_attention.cpp

namespace {

constexpr long kKeys = 16;          // keys whose scores are computed at a time, two vectors
constexpr long kFewQueries = 3;     // queries up to which turning the keys costs more than it saves
constexpr long kValues = 32;        // of the piece of values that stays in the first cache, 8 KiB of 64 columns
constexpr long kCacheAhead = 2048;  // bytes

// 8 numbers of each of 8 rows become columns.
inline void turn(const float* const rows[8], __m256 columns[8]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    const __m256 a = _mm256_loadu_ps(rows[i]), b = _mm256_loadu_ps(rows[i + 1]);
    pairs[i] = _mm256_unpacklo_ps(a, b);
    pairs[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 8; i += 4) {  // lane n of fours[i + c]: column 4 n + c of rows i to i + 3
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    columns[c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
    columns[4 + c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
  }
}

// columns: two vectors of keys, (2, K)
template <int K, int Queries>
inline void score_turned(const float* queries, const __m256* columns, float* scores, long stride) {
  __m256 sums[Queries][2];
  for (auto& query : sums) query[0] = query[1] = _mm256_setzero_ps();
  for (int k = 0; k < K; ++k) {
    const __m256 low = once(columns[k]), high = once(columns[K + k]);
    for (int r = 0; r < Queries; ++r) {
      const __m256 query = _mm256_broadcast_ss(queries + r * K + k);
      sums[r][0] = _mm256_fmadd_ps(query, low, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(query, high, sums[r][1]);
    }
  }
  for (int r = 0; r < Queries; ++r)
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(scores + r * stride + i * kVector, sums[r][i]);
}

// scores[r][s] = q[r] . k[s]: of many queries with the keys turned, so that no sum runs across a vector.
template <int K>
void score_many(const float* queries, const float* keys, long R, long end, float* scores, long stride) {
  for (long s = 0; s < end; s += kKeys) {
    prefetch(keys + s * K, kKeys * K, kCacheAhead);
    __m256 columns[2 * K];
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < K; k += kVector) {
        const float* rows[kVector];
        for (long j = 0; j < kVector; ++j) rows[j] = keys + std::min(s + i * kVector + j, end - 1) * K + k;
        turn(rows, columns + i * K + k);
      }
    long r = 0;
    for (; r + 4 <= R; r += 4) score_turned<K, 4>(queries + r * K, columns, scores + r * stride + s, stride);
    for (; r < R; ++r) score_turned<K, 1>(queries + r * K, columns, scores + r * stride + s, stride);
  }
}

template <int K>
void score_few(const float* queries, const float* keys, long R, long end, float* scores, long stride) {
  for (long s = 0; s < end; s += kVector) {
    prefetch(keys + s * K, kVector * K, kCacheAhead);
    for (long r = 0; r < R; ++r) {
      __m256 products[kVector];
      for (long j = 0; j < kVector; ++j) {
        const float* key = keys + std::min(s + j, end - 1) * K;
        products[j] = _mm256_setzero_ps();
        for (int k = 0; k < K; k += kVector)
          products[j] = _mm256_fmadd_ps(_mm256_loadu_ps(key + k), _mm256_loadu_ps(queries + r * K + k), products[j]);
      }
      _mm256_storeu_ps(scores + r * stride + s, sums_of(products));
    }
  }
}

// out[r] += sum over `count` values of weights[r][s] v[s], for some columns of a piece
template <int K, int Queries, int Vectors>
inline void mix(const float* weights, long stride, const float* values, long count, long ahead, float* out) {
  __m256 sums[Queries][Vectors];
  for (int r = 0; r < Queries; ++r)
    for (int i = 0; i < Vectors; ++i) sums[r][i] = _mm256_loadu_ps(out + r * K + kVector * i);
  for (long s = 0; s < count; ++s) {
    const float* value = values + s * K;
    prefetch(value, Vectors * kVector, ahead);
    __m256 weight[Queries];
    for (int r = 0; r < Queries; ++r) weight[r] = _mm256_broadcast_ss(weights + r * stride + s);
    for (int i = 0; i < Vectors; ++i) {
      const __m256 part = once(_mm256_loadu_ps(value + kVector * i));
      for (int r = 0; r < Queries; ++r) sums[r][i] = _mm256_fmadd_ps(weight[r], part, sums[r][i]);
    }
  }
  for (int r = 0; r < Queries; ++r)
    for (int i = 0; i < Vectors; ++i) _mm256_storeu_ps(out + r * K + kVector * i, sums[r][i]);
}

template <int K>
void mix_all(const float* weights, long stride, const float* values, long R, long end, float* out) {
  constexpr int alone = std::min(K / 8, 8), together = 4;  // vectors, for one query and for two
  std::fill(out, out + R * K, 0.0f);
  for (long s = 0; s < end; s += kValues) {
    const long count = std::min(kValues, end - s);
    long r = 0;
    for (; r + 2 <= R; r += 2)
      for (long column = 0; column < K; column += together * kVector)
        mix<K, 2, together>(weights + r * stride + s, stride, values + s * K + column, count, r ? 0 : kCacheAhead,
                            out + r * K + column);
    for (; r < R; ++r)
      for (long column = 0; column < K; column += alone * kVector)
        mix<K, 1, alone>(weights + r * stride + s, stride, values + s * K + column, count, r ? 0 : kCacheAhead,
                         out + r * K + column);
  }
}

template <int K>
void attend(const float* q, const float* k, const float* v, const float* bias, float* out, const long* sizes) {
  const long B = sizes[0], G = sizes[1], R = sizes[2], end = sizes[3];
  const long q_batch = sizes[4], head = sizes[5];  // elements between sequences of q, and between KV heads of k and v
  const long bias_batch = sizes[6], bias_group = sizes[7], bias_query = sizes[8];
  const long stride = (end + kKeys - 1) / kKeys * kKeys + kKeys;  // a line more, or all rows share a cache set
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
      const auto score = queries > kFewQueries ? score_many<K> : score_few<K>;
      score(q + b * q_batch + (g * R + first) * K, k + pair * head, queries, end, scores.data(), stride);
      for (long r = 0; r < queries; ++r)
        softmax(scores.data() + r * stride,
                bias ? bias + b * bias_batch + g * bias_group + (first + r) * bias_query : nullptr, end);
      mix_all<K>(scores.data(), stride, v + pair * head, queries, end, out + (pair * R + first) * K);
    }
  }
}

}  // namespace

#define EXPORT(K)                                                                                              \
  extern "C" void float32_##K(const float* q, const float* k, const float* v, const float* bias, float* out,   \
                              const long* sizes) {                                                             \
    attend<K>(q, k, v, bias, out, sizes);                                                                      \
  }
EXPORT(32)
EXPORT(64)
EXPORT(128)
