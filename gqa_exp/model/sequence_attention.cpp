// Attention of whole sequences, and its gradients, in bfloat16: for training and for the encoder.
//
// A unit of work is one key/value head of one sequence with the query heads that share it. Its queries are taken in
// blocks, whose scores stay in the processor's caches; of them the forward pass keeps only two numbers per query, from
// which the backward pass computes the weights again (Dao et al. 2022, FlashAttention, section 3.1).
// Scores, softmax and sums are float32. Compiled by native.py for the processor it runs on, which must have AVX-512
// with bfloat16.
//
// For products (see products.h) rows of K elements are brought into one of these orders:
//   gathered (rows, K / 2):     word (s, k) holds elements 2k and 2k + 1 of row s
//   turned (K / 2, rows):       the same, transposed
//   interleaved (rows / 2, K):  word (s, k) holds element k of rows 2s and 2s + 1
//   columns (K, rows / 2):      the same, transposed
// Where tiles multiply, words of a left side must lie side by side: then the gradients of keys and values, sums over
// queries, are computed transposed.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "dropout.h"
#include "products.h"

namespace {

constexpr long kQueries = 32;  // of a block at most; 32 and 64 measured the same
static_assert(kQueries % (2 * kTile) == 0);  // in tiles, sums over queries take them 32 at a time
constexpr long kRows = 8;      // of a product's left side at a time; in tiles 16

long row_unit() { return in_tiles ? kTile : kRows; }

// ---- products

// C = A B, or C += A B, for any multiple of row_unit() rows and of 32 columns; lines of B are `line` words apart, rows
// of C `row` numbers. In tiles, words of A have to lie side by side, and steps be a multiple of 16.
template <bool Add>
void product(Left a, const Word* b, long line, long steps, float* c, long row, long rows, long columns) {
  if (in_tiles) {
    for (long j = 0; j < columns; j += kColumns)
      for (long i = 0; i < rows; i += 2 * kTile) {
        const LeftTiles left{a.words + i * a.row, a.row, kTile, kTile * a.row};
        float* to = c + i * row + j;
        product_of_tiles(rows - i, left, b + j, line, steps, {Add ? to : nullptr, row}, {to, row}, [](long) {});
      }
    return;
  }
  for (long j = 0; j < columns; j += kColumns)
    for (long i = 0; i < rows; i += kRows) {
      const auto store = [to = c + i * row + j, row](int r, int half, __m512 sum) {
        float* at = to + r * row + 16 * half;
        _mm512_store_ps(at, Add ? _mm512_add_ps(_mm512_load_ps(at), sum) : sum);
      };
      product_tile<kRows>({a.words + i * a.row, a.row, a.step}, b + j, line, steps, store, [](long) {});
    }
}

// ---- rows of K elements, brought into order

template <int K>
struct Rows {
  const BFloat16* x;
  long row, count;  // elements from one row to the next; rows, beyond which zeros are read

  __m512i words(long s, long w) const {
    return s < count ? _mm512_loadu_si512(x + s * row + 2 * w) : _mm512_setzero_si512();
  }
  __m512i elements(long s, long k) const {
    return s < count ? words_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + s * row + k)))
                     : _mm512_setzero_si512();
  }
  void gathered(long rows, Word* out) const {
    for (long s = 0; s < rows; ++s)
      for (long w = 0; w < K / 2; w += 16) _mm512_store_si512(out + s * (K / 2) + w, words(s, w));
  }
  void turned(long rows, long line, Word* out) const {
    for (long s = 0; s < rows; s += 16)
      for (long w = 0; w < K / 2; w += 16) {
        __m512i from[16], to[16];
        for (long i = 0; i < 16; ++i) from[i] = words(s + i, w);
        turn(from, to);
        for (long i = 0; i < 16; ++i) _mm512_store_si512(out + (w + i) * line + s, to[i]);
      }
  }
  void interleaved(long rows, Word* out) const {
    for (long s = 0; s < rows; s += 2)
      for (long k = 0; k < K; k += 16)
        _mm512_store_si512(out + s / 2 * K + k, pairs_of(elements(s, k), elements(s + 1, k)));
  }
  void columns(long rows, Word* out) const {
    for (long s = 0; s < rows; s += 2 * kTile)
      for (long k = 0; k < K; k += 16) {
        __m512i from[16], to[16];
        for (long i = 0; i < 16; ++i) from[i] = pairs_of(elements(s + 2 * i, k), elements(s + 2 * i + 1, k));
        turn(from, to);
        for (long i = 0; i < 16; ++i) _mm512_store_si512(out + (k + i) * (rows / 2) + s / 2, to[i]);
      }
  }
};

// ---- attention

// What a call is about. Q is (B, T, heads, K), K and V are (B, S, G, K), all contiguous.
template <int K, typename Bias>
struct Attention {
  const BFloat16 *q, *k, *v;
  const Bias* bias;    // added to the scores by distance, (heads, T + S - 1), farthest before a query first; or null
  const float* mask;   // added too: (B, S), or null
  long B, T, S, G, R;  // R query heads to each of G key/value heads
  Dropout dropout;     // of weights
  long distances = T + S - 1;
  long heads = G * R;
  long keys = up(S, kColumns);   // padded
  long line = keys + kSkew;      // words of a line of keys
  long half = keys / 2 + kSkew;  // words of a line of pairs of keys

  long at(long b, long h, long t) const { return ((b * T + t) * heads + h) * K; }
  long row(long b, long h, long t) const { return (b * heads + h) * T + t; }
  // Which weights of a query are kept, for 64 keys from s on.
  std::uint64_t kept(long b, long h, long t, long s) const {
    return dropout.kept(row(b, h, t) * (up(S, Dropout::elements) / Dropout::elements) + s / Dropout::elements);
  }
  long key_at(long b, long g, long s) const { return ((b * S + s) * G + g) * K; }
  Rows<K> query_rows(const BFloat16* x, long b, long h, long first, long count) const {
    return {x + at(b, h, first), heads * K, count};
  }
  Rows<K> key_rows(const BFloat16* x, long b, long g) const { return {x + key_at(b, g, 0), G * K, S}; }
  long distance(long t) const { return T - 1 - t; }  // of the first key from a query; the others' follow
  const Bias* bias_row(long h, long t) const { return bias ? bias + h * distances + distance(t) : nullptr; }
  const float* mask_row(long b) const { return mask ? mask + b * S : nullptr; }

  // What was summed for each key becomes its gradient; sums are (keys, K), in tiles (K, line).
  void write_key_sums(const float* sums, long b, long g, BFloat16* gradient) const {
    if (!in_tiles) {
      for (long s = 0; s < S; ++s)
        for (long k = 0; k < K; k += 16) narrow(gradient + key_at(b, g, s) + k, _mm512_load_ps(sums + s * K + k));
      return;
    }
    for (long s = 0; s < S; s += 16)
      for (long k = 0; k < K; k += 16) {
        __m512i from[16], rows[16];
        for (long i = 0; i < 16; ++i) from[i] = _mm512_load_si512(sums + (k + i) * line + s);
        turn(from, rows);
        for (long i = 0; i < std::min(16L, S - s); ++i)
          narrow(gradient + key_at(b, g, s + i) + k, _mm512_castsi512_ps(rows[i]));
      }
  }

  __mmask16 there(long s) const {  // which of 16 keys there are
    return s + 16 <= S ? 0xffff : static_cast<__mmask16>((1u << std::max(0L, S - s)) - 1);
  }
  __m512 score(const float* products, const Bias* bias, const float* mask, long s) const {
    __m512 sum = _mm512_load_ps(products + s);
    if (s + 16 <= S) {
      if (bias) sum = _mm512_add_ps(sum, widen(bias + s));
      return mask ? _mm512_add_ps(sum, _mm512_loadu_ps(mask + s)) : sum;
    }
    if (bias) sum = _mm512_add_ps(sum, widen(bias + s, there(s)));
    if (mask) sum = _mm512_add_ps(sum, widen(mask + s, there(s)));
    return _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), there(s), sum);
  }
};

// The calling thread's memory for a unit of work, handed out piece by piece.
class Memory {
 public:
  explicit Memory(long words) : next_(scratch<Word>(words)) {}
  explicit operator bool() const { return next_ != nullptr; }
  Word* words(long count) {
    Word* piece = next_;
    next_ += up(count, kLine / sizeof(Word));
    return piece;
  }
  float* floats(long count) { return reinterpret_cast<float*>(words(count)); }

 private:
  Word* next_;
};

// Does the work in all threads, each with so many words of memory; returns whether there were as many.
template <typename Work>
bool in_all_threads(long words, Work work) {
  bool enough = true;
#pragma omp parallel
  {
    Memory memory(words);
    if (!memory)
#pragma omp atomic write
      enough = false;
#pragma omp barrier
    if (enough) {
      const WholeTiles tiles;
      work(memory);
    }
  }
  return enough;
}

// Of some queries of a head, the products with all keys become scores, and of these exp(score - highest) is written as
// weights, but for those that are dropped. For each query 1 / the sum of all goes to `inverses`, and the highest score
// and this to `softmax`.
template <int K, typename Bias>
void weigh(const Attention<K, Bias>& a, long b, long h, long first, long count, float* products, Word* weights,
           float* inverses, float* softmax) {
  float tops[kQueries];
  for (long t = 0; t < count; ++t) {
    float* row = products + t * a.line;
    __m512 highest = _mm512_set1_ps(std::numeric_limits<float>::lowest());
    for (long s = 0; s < a.keys; s += 16) {
      const __m512 score = a.score(row, a.bias_row(h, first + t), a.mask_row(b), s);
      _mm512_store_ps(row + s, score);
      highest = _mm512_max_ps(highest, score);
    }
    tops[t] = _mm512_reduce_max_ps(highest);
  }
  for (long t = 0; t < count; ++t) {  // apart, so that no row waits for its highest score
    const float* row = products + t * a.line;
    const __m512 top = _mm512_set1_ps(tops[t]);
    __m512 total = _mm512_setzero_ps();
    std::uint64_t kept = 0;
    for (long s = 0; s < a.keys; s += 32, kept >>= 32) {
      if (s % Dropout::elements == 0) kept = a.kept(b, h, first + t, s);
      const __m512 low = exponential(_mm512_sub_ps(_mm512_load_ps(row + s), top));
      const __m512 high = exponential(_mm512_sub_ps(_mm512_load_ps(row + s + 16), top));
      total = _mm512_add_ps(total, _mm512_add_ps(low, high));
      const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_store_si512(weights + t * a.half + s / 2, _mm512_maskz_mov_epi16(static_cast<__mmask32>(kept), rounded));
    }
    inverses[t] = 1 / _mm512_reduce_add_ps(total);
    float* taken = softmax + 2 * a.row(b, h, first + t);
    taken[0] = tops[t];
    taken[1] = inverses[t];
  }
}

// Writes the weighted values of each query, (B, T, heads, K), and what its softmax took, (B, heads, T, 2): the highest
// score, and 1 / the sum of exp(score - highest). Returns whether there was memory for it.
template <int K, typename Bias>
bool forward(const Attention<K, Bias> a, BFloat16* out, float* softmax) {
  const long words = a.line * K / 2 + a.keys * K / 2 + kQueries * (K / 2 + a.line + a.half + K);
  const float scale = a.dropout.scale();
  return in_all_threads(words, [=](Memory memory) {
    Word *keys = memory.words(a.line * K / 2), *values = memory.words(a.keys * K / 2);
    Word *queries = memory.words(kQueries * K / 2), *weights = memory.words(kQueries * a.half);
    float *products = memory.floats(kQueries * a.line), *sums = memory.floats(kQueries * K);
#pragma omp for schedule(static)
    for (long unit = 0; unit < a.B * a.G; ++unit) {
      const long b = unit / a.G, g = unit % a.G;
      a.key_rows(a.k, b, g).turned(a.keys, a.line, keys);
      a.key_rows(a.v, b, g).interleaved(a.keys, values);
      for (long h = g * a.R; h < (g + 1) * a.R; ++h)
        for (long first = 0; first < a.T; first += kQueries) {
          const long count = std::min(kQueries, a.T - first), rows = up(count, row_unit());
          float inverses[kQueries];
          a.query_rows(a.q, b, h, first, count).gathered(rows, queries);
          product<false>({queries, K / 2, 1}, keys, a.line, K / 2, products, a.line, rows, a.keys);
          weigh(a, b, h, first, count, products, weights, inverses, softmax);
          product<false>({weights, a.half, 1}, values, K, a.keys / 2, sums, K, rows, K);
          for (long t = 0; t < count; ++t)
            for (long k = 0; k < K; k += 16)
              narrow(out + a.at(b, h, first + t) + k,
                     _mm512_mul_ps(_mm512_load_ps(sums + t * K + k), _mm512_set1_ps(inverses[t] * scale)));
        }
    }
  });
}

template <int K>
struct Gradients {
  const BFloat16* out;  // of the forward pass
  const float* softmax;
  const BFloat16* d_out;
  BFloat16 *d_q, *d_k, *d_v;
  // (shares, heads, 2, distances), added to, or null: the gradient is the sum over shares of the batch, and over queries
  // of even and of odd place, which are taken in pairs and would wait for each other's sums.
  float* d_bias;
  long shares;

  // The gradient of a query's weights, averaged by the weights: with the softmax's gradient, the scores' gradient is
  // weight * (weight's gradient - this).
  float mean(long at) const {
    __m512 sum = _mm512_setzero_ps();
    for (long k = 0; k < K; k += 16) sum = _mm512_fmadd_ps(widen(out + at + k), widen(d_out + at + k), sum);
    return _mm512_reduce_add_ps(sum);
  }
};

// Memory for the scores of a block of queries, and what the backward pass makes of them.
template <int K, typename Bias>
struct Block {
  static constexpr long lines = 3, halves = 1;  // for each query
  float *products, *d_weights;                  // of queries and keys; of gradients of the output and values
  Word *d_scores, *d_score_pairs, *weight_pairs;

  Block(const Attention<K, Bias>& a, Memory& memory)
      : products(memory.floats(kQueries * a.line)),
        d_weights(memory.floats(kQueries * a.line)),
        d_scores(memory.words(kQueries * a.half)),
        d_score_pairs(memory.words(kQueries / 2 * a.line)),
        weight_pairs(memory.words(kQueries / 2 * a.line)) {}

  // Pairs of queries beyond the last: in tiles they are multiplied too, by zeros, and what an earlier block left there
  // may be NaN.
  void clear_pairs(const Attention<K, Bias>& a, long from, long to) const {
    for (Word* words : {d_score_pairs, weight_pairs}) std::fill(words + from * a.line, words + to * a.line, 0u);
  }

  // From the first two, the others, and what these queries add to a share of the bias's gradient.
  void differentiate(const Attention<K, Bias>& a, const Gradients<K>& d, long b, long h, long first, long count,
                     long part) const {
    const __m512 scale = _mm512_set1_ps(a.dropout.scale());
    for (long t = 0; t < count; t += 2) {
      const Bias* bias[2];
      float* d_bias[2];
      __m512 top[2], inverse[2], mean[2];
      long queries[2];
      std::uint64_t kept[2] = {};
      for (long i = 0; i < 2; ++i) {
        const bool real = t + i < count;  // other rows fill the last block up: their weights are zero
        const long query = queries[i] = first + std::min(t + i, count - 1);
        const float* softmax = d.softmax + 2 * a.row(b, h, query);
        bias[i] = a.bias_row(h, query);
        const long sums = ((part * a.heads + h) * 2 + i) * a.distances;
        d_bias[i] = d.d_bias && real ? d.d_bias + sums + a.distance(query) : nullptr;
        top[i] = _mm512_set1_ps(real ? softmax[0] : std::numeric_limits<float>::infinity());
        inverse[i] = _mm512_set1_ps(softmax[1]);
        mean[i] = _mm512_set1_ps(d.mean(a.at(b, h, query)));
      }
      for (long s = 0; s < a.keys; s += 16) {
        __m512i weight_words[2], gradient_words[2];
#pragma GCC unroll 2
        for (long i = 0; i < 2; ++i) {
          if (s % Dropout::elements == 0) kept[i] = a.kept(b, h, queries[i], s);
          const auto some = static_cast<__mmask16>(kept[i]);
          kept[i] >>= 16;
          const long at = (t + i) * a.line;
          const __m512 score = a.score(products + at, bias[i], a.mask_row(b), s);
          const __m512 weight = _mm512_mul_ps(inverse[i], exponential(_mm512_sub_ps(score, top[i])));
          const __m512 d_weight = _mm512_maskz_mul_ps(some, _mm512_load_ps(d_weights + at + s), scale);
          const __m512 gradient = _mm512_mul_ps(weight, _mm512_sub_ps(d_weight, mean[i]));
          if (d_bias[i]) {
            float* to = d_bias[i] + s;
            _mm512_mask_storeu_ps(to, a.there(s), _mm512_add_ps(widen(to, a.there(s)), gradient));
          }
          const __m256i bits = rounded(gradient);
          _mm256_store_si256(reinterpret_cast<__m256i*>(d_scores + (t + i) * a.half + s / 2), bits);
          gradient_words[i] = words_of(bits);
          weight_words[i] = words_of(rounded(_mm512_maskz_mul_ps(some, weight, scale)));
        }
        const long at = t / 2 * a.line + s;
        _mm512_store_si512(weight_pairs + at, pairs_of(weight_words[0], weight_words[1]));
        _mm512_store_si512(d_score_pairs + at, pairs_of(gradient_words[0], gradient_words[1]));
      }
    }
  }
};

// Writes the gradients. Returns whether there was memory for it.
template <int K, typename Bias>
bool backward(const Attention<K, Bias> a, const Gradients<K> d) {
  using Scores = Block<K, Bias>;
  const long share = (a.B + d.shares - 1) / d.shares;
  const long words = a.line * (K + 2 * K) + a.keys * K / 2 +
                     kQueries * (2 * K + K + Scores::lines * a.line + Scores::halves * a.half);
  return in_all_threads(words, [=](Memory memory) {
    Word *keys = memory.words(a.line * K / 2), *values = memory.words(a.line * K / 2);
    Word* key_pairs = memory.words(a.keys * K / 2);
    Word *queries = memory.words(kQueries * K / 2), *query_pairs = memory.words(kQueries * K / 2);
    Word *d_outs = memory.words(kQueries * K / 2), *d_out_pairs = memory.words(kQueries * K / 2);
    float *q_sums = memory.floats(kQueries * K), *k_sums = memory.floats(a.line * K);
    float* v_sums = memory.floats(a.line * K);
    const Scores block(a, memory);
#pragma omp for collapse(2) schedule(static)
    for (long g = 0; g < a.G; ++g)
      for (long part = 0; part < d.shares; ++part)
        for (long b = part * share; b < std::min(a.B, (part + 1) * share); ++b) {
          a.key_rows(a.k, b, g).turned(a.keys, a.line, keys);
          a.key_rows(a.k, b, g).interleaved(a.keys, key_pairs);
          a.key_rows(a.v, b, g).turned(a.keys, a.line, values);
          std::fill(k_sums, k_sums + a.line * K, 0.0f);
          std::fill(v_sums, v_sums + a.line * K, 0.0f);
          for (long h = g * a.R; h < (g + 1) * a.R; ++h)
            for (long first = 0; first < a.T; first += kQueries) {
              const long count = std::min(kQueries, a.T - first), rows = up(count, row_unit());
              const Rows<K> q = a.query_rows(a.q, b, h, first, count);
              const Rows<K> d_out = a.query_rows(d.d_out, b, h, first, count);
              q.gathered(rows, queries);
              d_out.gathered(rows, d_outs);
              product<false>({queries, K / 2, 1}, keys, a.line, K / 2, block.products, a.line, rows, a.keys);
              product<false>({d_outs, K / 2, 1}, values, a.line, K / 2, block.d_weights, a.line, rows, a.keys);
              block.differentiate(a, d, b, h, first, count, part);
              product<false>({block.d_scores, a.half, 1}, key_pairs, K, a.keys / 2, q_sums, K, rows, K);
              if (in_tiles) {
                const long all = up(count, 2 * kTile), pairs = all / 2;
                block.clear_pairs(a, (count + 1) / 2, pairs);
                q.columns(all, query_pairs);
                d_out.columns(all, d_out_pairs);
                product<true>({query_pairs, pairs, 1}, block.d_score_pairs, a.line, pairs, k_sums, a.line, K, a.keys);
                product<true>({d_out_pairs, pairs, 1}, block.weight_pairs, a.line, pairs, v_sums, a.line, K, a.keys);
              } else {
                const long pairs = (count + 1) / 2;
                q.interleaved(rows, query_pairs);
                d_out.interleaved(rows, d_out_pairs);
                product<true>({block.d_score_pairs, 1, a.line}, query_pairs, K, pairs, k_sums, K, a.keys, K);
                product<true>({block.weight_pairs, 1, a.line}, d_out_pairs, K, pairs, v_sums, K, a.keys, K);
              }
              for (long t = 0; t < count; ++t)
                for (long k = 0; k < K; k += 16)
                  narrow(d.d_q + a.at(b, h, first + t) + k, _mm512_load_ps(q_sums + t * K + k));
            }
          a.write_key_sums(k_sums, b, g, d.d_k);
          a.write_key_sums(v_sums, b, g, d.d_v);
        }
  });
}

template <int K, typename Bias>
Attention<K, Bias> attention_of(const void* const* t, const long* n) {
  const auto bfloat16 = [t](int i) { return static_cast<const BFloat16*>(t[i]); };
  return {bfloat16(0), bfloat16(1), bfloat16(2), static_cast<const Bias*>(t[3]), static_cast<const float*>(t[4]),
          n[0],        n[1],        n[2],        n[3],                           n[4],
          {static_cast<const std::int64_t*>(t[5]), n[5]}};
}

}  // namespace

// Tensors: q, k, v, bias, mask, the dropout's seed, out, softmax; backward also d_out, d_q, d_k, d_v, d_bias. Sizes: B,
// T, S, G, R, what the dropout drops (see dropout.h); backward also the shares.
#define EXPORT(K, name, Bias)                                                                                       \
  extern "C" int forward_##K##_##name(void* const* t, const long* n) {                                              \
    return !forward(attention_of<K, Bias>(t, n), static_cast<BFloat16*>(t[6]), static_cast<float*>(t[7]));          \
  }                                                                                                                 \
  extern "C" int backward_##K##_##name(void* const* t, const long* n) {                                             \
    const auto bfloat16 = [t](int i) { return static_cast<BFloat16*>(t[i]); };                                      \
    const auto float32 = [t](int i) { return static_cast<float*>(t[i]); };                                          \
    return !backward(attention_of<K, Bias>(t, n), Gradients<K>{bfloat16(6), float32(7), bfloat16(8), bfloat16(9),   \
                                                               bfloat16(10), bfloat16(11), float32(12), n[6]});     \
  }
EXPORT(32, float32, float)
EXPORT(64, float32, float)
EXPORT(128, float32, float)
EXPORT(32, bfloat16, BFloat16)
EXPORT(64, bfloat16, BFloat16)
EXPORT(128, bfloat16, BFloat16)
