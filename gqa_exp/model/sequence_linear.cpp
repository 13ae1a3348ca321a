// Linear layers over whole sequences, and their gradients, in bfloat16: for training.
//
// Compiled by native.py for the processor it runs on, which must have AVX-512 with bfloat16. Weights are float32, and
// rounded here, or bfloat16; their gradients are float32. Numbers of inputs and outputs are multiples of 32.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>

#include "products.h"

namespace {

constexpr int kRows = 14;                 // of a product's left side at a time: 28 of 32 registers hold sums
constexpr long kPanelBytes = 512 * 1024;  // of weights that meet all rows before the next do, half of the second cache
constexpr long kTilePanelBytes = 1024 * 1024;  // the same where tiles multiply: processors that do have twice as much
constexpr long kTilePart = 512;                // pairs of inputs that are summed there before the next are taken up
constexpr long kRowBytes = 128 * 1024;    // of rows that meet all of these before the next do
constexpr long kChunk = 192;              // rows whose products are summed before a weight's gradient takes them up
constexpr long kTileChunk = 256;          // rows laid out at a time in tiles, where sums go on from those before

// A tile of a number of rows that is only known here.
template <typename Store, typename Meanwhile, int Rows = kRows>
inline void some_rows(long rows, Left a, const Word* b, long line, long steps, Store store, Meanwhile meanwhile) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      product_tile<Rows>(a, b, line, steps, store, meanwhile);
    else
      some_rows<Store, Meanwhile, Rows - 1>(rows, a, b, line, steps, store, meanwhile);
  }
}

// Calls work(first, rows) for parts of as equal size as can be, of kRows at most.
template <typename Work>
inline void in_parts(long rows, Work work) {
  const long parts = (rows + kRows - 1) / kRows;
  for (long part = 0; part < parts; ++part) {
    const long first = rows * part / parts;
    work(first, rows * (part + 1) / parts - first);
  }
}

// ---- weights, laid out for products in panels of 32 columns, (columns / 32, pairs, 32)

// 16 pairs of elements that follow each other, rounded.
inline __m512i pairs_at(const BFloat16* p) { return _mm512_loadu_si512(p); }
inline __m512i pairs_at(const float* p) { return (__m512i)_mm512_cvtne2ps_pbh(widen(p + 16), widen(p)); }
// 16 elements, rounded, each in a word.
inline __m512i words_at(const BFloat16* p) { return words_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m512i words_at(const float* p) { return words_of(rounded(widen(p))); }

// Columns are outputs, pairs are of inputs. By all threads together.
template <typename Weight>
void lay_out_outputs(const Weight* weight, long outputs, long inputs, Word* panels) {
  const long pairs = inputs / 2;
#pragma omp for schedule(static)
  for (long n = 0; n < outputs; n += 16)
    for (long p = 0; p < pairs; p += 16) {
      __m512i from[16], to[16];
      for (long i = 0; i < 16; ++i) from[i] = pairs_at(weight + (n + i) * inputs + 2 * p);
      turn(from, to);
      Word* panel = panels + (n / kColumns * pairs + p) * kColumns + n % kColumns;
      for (long i = 0; i < 16; ++i) _mm512_store_si512(panel + i * kColumns, to[i]);
    }
}

// Columns are inputs, pairs are of outputs. By all threads together.
template <typename Weight>
void lay_out_inputs(const Weight* weight, long outputs, long inputs, Word* panels) {
  const long pairs = outputs / 2;
#pragma omp for schedule(static)
  for (long p = 0; p < pairs; ++p) {
    const Weight *low = weight + 2 * p * inputs, *high = low + inputs;
    for (long k = 0; k < inputs; k += 16)
      _mm512_store_si512(panels + (k / kColumns * pairs + p) * kColumns + k % kColumns,
                         pairs_of(words_at(low + k), words_at(high + k)));
  }
}

// Fetches memory while something else is computed, evenly over tiles and their steps.
class Spread {
 public:
  Spread(const void* from, long bytes, long tiles, long steps)
      : from_(static_cast<const char*>(from)),
        each_((bytes / kLine + tiles - 1) / tiles),
        scale_((each_ << 16) / steps) {}
  // What to do at a tile's steps.
  auto fetch(long tile) const {
    return [from = from_ + tile * each_ * kLine, scale = scale_](long step) {
      _mm_prefetch(from + (step * scale >> 16) * kLine, _MM_HINT_T1);
    };
  }

 private:
  const char* from_;
  long each_, scale_;  // lines of a tile; 65536 times lines of a step
};

// A block of columns of a matrix of some rows.
struct Columns {
  const BFloat16* x;
  long rows, row, first, count;  // rows; elements from one to the next; columns

  const BFloat16* at(long s) const { return x + s * row + first; }
  long lines() const { return up(count * static_cast<long>(sizeof(BFloat16)), kLine) / kLine; }
  // Of 16 columns, row s and the next as pairs; rows behind the last are taken as zeros.
  __m512i pairs_at(long s, long from) const {
    const __m512i zeros = _mm512_setzero_si512();
    const __m512i low = s < rows ? words_at(at(s) + from) : zeros;
    return pairs_of(low, s + 1 < rows ? words_at(at(s + 1) + from) : zeros);
  }
  // Pairs of rows `start` to `end` of some columns; lines of pairs are `line` apart.
  void pair_up(long start, long end, long from, long columns, Word* out, long line) const {
    for (long s = start; s < end; s += 2, out += line)
      for (long k = 0; k < columns; k += 16) _mm512_store_si512(out + k, pairs_at(s, from + k));
  }
};

// Fetches some rows from memory, line by line, evenly over a number of calls, one at least if there are any.
class EvenlyAhead {
 public:
  EvenlyAhead(Columns x, long start, long end, long calls)
      : at_(reinterpret_cast<const char*>(x.at(start))),
        each_row_(x.lines()),
        skipped_(x.row * static_cast<long>(sizeof(BFloat16)) - each_row_ * kLine),
        of_row_(each_row_),
        lines_((end - start) * each_row_),
        calls_(calls) {}
  void operator()() {
    for (due_ += lines_; due_ >= calls_; due_ -= calls_) {
      _mm_prefetch(at_, _MM_HINT_T1);
      at_ += kLine;
      if (!--of_row_) {
        at_ += skipped_;
        of_row_ = each_row_;
      }
    }
  }

 private:
  const char* at_;
  long each_row_, skipped_, of_row_, lines_, calls_, due_ = 0;
};

constexpr long kTall = 2 * kTile;  // rows of a product in tiles

// Fetches what two tiles take of as many words as there are steps from one pause to the next.
inline void fetch_pause(const Word* at) {
  const char* line = reinterpret_cast<const char*>(at);
#pragma GCC unroll 8
  for (long i = 0; i < 2 * kPace; ++i) _mm_prefetch(line + i * kLine, _MM_HINT_T0);
}

// Writes 32 columns of sums, whose rows follow each other, as bfloat16, a few rows at a time.
struct Rounding {
  const float* from = nullptr;
  Numbers<BFloat16> to = {};
  long left = 0;  // rows

  void some(long rows) {
    for (; rows > 0 && left > 0; --rows, --left, from += kColumns, to.at += to.row)
      _mm512_storeu_si512(to.at, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(from + 16), _mm512_load_ps(from)));
  }
};

// As multiply, for 32 rows and more. Returns whether there was memory for it.
//
// 32 rows at a time meet some panels, which stay in the second cache. Many inputs are summed in parts. In pauses between
// products of tiles what comes next is fetched (but where a part or a group ends), and the sums of the last 32 columns
// are rounded, all before others are stored in their place.
bool multiply_in_tiles(const BFloat16* x, const Word* panels, BFloat16* y, long rows, long inner, long columns) {
  constexpr long block = kTall * kColumns;
  const long pairs = inner / 2, part = std::min(pairs, kTilePart), width = columns / kColumns;
  const long group = std::max(1L, kTilePanelBytes / (part * kColumns * static_cast<long>(sizeof(Word)))) * kColumns;
  const Share share((rows + kTall - 1) / kTall);
  const long begin = share.begin * kTall, end = std::min(rows, share.end * kTall);
  if (begin >= end) return true;
  const bool whole = part == pairs;
  float* kept = whole ? nullptr : scratch<float>((share.end - share.begin) * width * block);  // of 32 x 32 each
  if (!whole && !kept) return false;
  const WholeTiles tiles;
  alignas(kLine) float sums[block];
  Rounding rounding;
  for (long p = 0; p < pairs; p += part)
    for (long from_column = 0; from_column < columns; from_column += group)
      for (long first = begin; first < end; first += kTall) {
        // The last rows, if they are fewer, are taken with some before them, of which nothing is written.
        const long known = std::max(0L, first + kTall - rows), end_column = std::min(columns, from_column + group);
        const long steps = std::min(part, pairs - p), pauses = steps / kPace, each = (kTall + pauses - 1) / pauses;
        const bool last = p + steps == pairs;
        const Word* left = reinterpret_cast<const Word*>(x + (first - known) * inner) + p;
        const long start = first + kTall < end ? first + kTall : begin;
        EvenlyAhead ahead({x, rows, inner, 2 * p, 2 * steps}, start, std::min(end, start + kTall),
                          (end_column - from_column) / kColumns * pauses);
        for (long j = from_column; j < end_column; j += kColumns) {
          const Word* panel = panels + j * pairs + p * kColumns;
          float* at = whole ? nullptr : kept + ((first - begin) / kTall * width + j / kColumns) * block;
          const Rounding next{sums + known * kColumns, {y + first * columns + j, columns}, last ? kTall - known : 0};
          long row = 0;  // to be written after this product
          product_of_tiles(kTall, {left, pairs, kTile, kTile * pairs}, panel, kColumns, steps, {p ? at : nullptr, kColumns},
                           {last ? sums : at, kColumns}, [&](long step) {
                             fetch_pause(panel + (step + kTile) * kColumns);
                             ahead();
                             for (long i = 0; i < each && row < next.left; ++i, ++row)
                               __builtin_prefetch(next.to.at + row * columns, 1);
                             rounding.some(each);
                           });
          rounding = next;
        }
      }
  rounding.some(kTall);
  return true;
}

// Y = X W for rows of X, each thread some of them. By all threads together.
//
// Some panels at a time meet all rows, and some rows at a time all of these panels: both stay in the second cache.
// Returns whether there was memory for it.
bool multiply(const BFloat16* x, const Word* panels, BFloat16* y, long rows, long inner, long columns) {
  if (in_tiles && rows >= kTall) return multiply_in_tiles(x, panels, y, rows, inner, columns);
  const long pairs = inner / 2, row_bytes = inner * static_cast<long>(sizeof(BFloat16));
  const long block = std::max(1L, kRowBytes / row_bytes / kRows) * kRows;
  const long group = std::max(1L, kPanelBytes / row_bytes / kColumns) * kColumns;
  const long threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const long share = up((rows + threads - 1) / threads, kRows), end = std::min(rows, (thread + 1) * share);
  for (long from_column = 0; from_column < columns; from_column += group)
    for (long first = thread * share; first < end; first += block) {
      const long end_column = std::min(columns, from_column + group), taken = std::min(block, end - first);
      const long tiles = (end_column - from_column) / kColumns * ((taken + kRows - 1) / kRows);
      const Spread ahead(x + (first + taken) * inner, std::min(block, end - first - taken) * row_bytes, tiles, pairs);
      long tile = 0;
      for (long j = from_column; j < end_column; j += kColumns)
        in_parts(taken, [&, j](long i, long count) {
          const Word* left = reinterpret_cast<const Word*>(x + (first + i) * inner);
          BFloat16* to = y + (first + i) * columns + j;
          const auto store = [=](int row, int half, __m512 sums) { narrow(to + row * columns + 16 * half, sums); };
          some_rows(count, {left, pairs, 1}, panels + j * pairs, kColumns, pairs, store, ahead.fetch(tile++));
        });
    }
  return true;
}

// ---- gradients of weights

// Fetches rows from memory while others are multiplied: at each call for a tile, one line of every second row, spread
// over all tiles; what lies behind the last row is fetched in vain. Gradients are 4 to 17 % faster by it.
class Ahead {
 public:
  Ahead(Columns d, Columns x, long start, long tiles)
      : d_(d), x_(x), start_(start), needed_(2 * (d.lines() + x.lines())), every_(std::max(1L, tiles / needed_)) {}
  // What to do at the next tile's steps.
  auto fetch() {
    const long part = tile_ / every_, line = part / 2, each = kLine / sizeof(BFloat16);
    const bool due = part < needed_ && tile_ % every_ == 0, of_d = line < d_.lines();
    ++tile_;
    const Columns& m = of_d ? d_ : x_;
    const BFloat16* from = due ? m.at(start_ + part % 2) + (of_d ? line : line - d_.lines()) * each : d_.x;
    return [from, row = due ? 2 * m.row : 0](long step) {
      _mm_prefetch(reinterpret_cast<const char*>(from + step * row), _MM_HINT_T1);
    };
  }

 private:
  Columns d_, x_;
  long start_, needed_, every_, tile_ = 0;
};

// As sum_outer, in tiles. Sums are kept block by block until the last rows are added: rows of the gradient lie in steps
// of which many share a set of the first cache.
bool sum_outer_in_tiles(Columns d, Columns x, float* sums, long row) {
  constexpr long pairs = kTileChunk / 2, block = kTall * kColumns;
  const long height = up(d.count, kTall), products = height / kTall * (x.count / kColumns);
  if (!products) return true;
  Word* left = scratch<Word>(pairs * (height + kColumns));  // (height / 32, pairs / 16, 2 tiles)
  float* kept = scratch<float>(products * block);           // (x.count / 32, height / 32, 32, 32)
  if (!left || !kept) return false;
  Word* right = left + pairs * height;
  const WholeTiles tiles;
  for (long start = 0; start == 0 || start < x.rows; start += kTileChunk) {  // once for no rows
    const long end = std::min(x.rows, start + kTileChunk), steps = up(end - start, kTall) / 2;
    for (long p = 0; p < steps; p += kTile)
      for (long i = 0; i < d.count; i += kTile) {
        __m512i from[kTile], to[kTile];
        for (long n = 0; n < kTile; ++n) from[n] = d.pairs_at(start + 2 * (p + n), i);
        turn(from, to);
        Word* tile = left + i / kTall * kTall * steps + p * kTall + i % kTall / kTile * kTileWords;
        for (long n = 0; n < kTile; ++n) _mm512_store_si512(tile + n * kTile, to[n]);
      }
    const long next_end = std::min(x.rows, end + kTileChunk), pauses = products * steps / kPace;
    EvenlyAhead next_d(d, end, next_end, pauses), next_x(x, end, next_end, pauses);
    const bool last = end == x.rows;
    float* at = kept;
    for (long j = 0; j < x.count; j += kColumns) {
      x.pair_up(start, start + 2 * steps, j, kColumns, right, kColumns);
      for (long i = 0; i < d.count; i += kTall, at += block) {
        const Word* panel = left + i * steps;
        const auto before = Numbers<const float>{start ? at : nullptr, kColumns};
        const auto after = last ? Numbers<float>{sums + i * row + j, row} : Numbers<float>{at, kColumns};
        product_of_tiles(d.count - i, {panel, kTile, 2 * kTileWords, kTileWords}, right, kColumns, steps, before, after,
                         [&, next = reinterpret_cast<const char*>(at + block)](long step) {
                           fetch_pause(panel + (step + 2 * kTile) * kTall);
                           for (long line = 0; line < 2; ++line)  // of a block's 64, in 32 pauses
                             _mm_prefetch(next + (step / 2 + line) * kLine, _MM_HINT_T0);
                           next_d();
                           next_x();
                         });
      }
    }
  }
  return true;
}

// Writes D^T X as sums, whose rows are `row` numbers apart. Returns whether there was memory for it.
bool sum_outer(Columns d, Columns x, float* sums, long row) {
  if (in_tiles) return sum_outer_in_tiles(d, x, sums, row);
  const long line = d.count + kSkew;
  Word* left = scratch<Word>(kChunk / 2 * (line + kColumns));
  if (!left) return false;
  for (long i = 0; i < d.count; ++i) std::fill(sums + i * row, sums + i * row + x.count, 0.0f);
  Word* right = left + kChunk / 2 * line;  // of 32 columns only, so that it stays in the first cache
  const long tiles = (d.count + kRows - 1) / kRows * (x.count / kColumns);
  for (long start = 0; start < x.rows; start += kChunk) {
    const long end = std::min(x.rows, start + kChunk);
    d.pair_up(start, end, 0, d.count, left, line);
    Ahead ahead(d, x, end, tiles);
    for (long j = 0; j < x.count; j += kColumns) {
      x.pair_up(start, end, j, kColumns, right, kColumns);
      in_parts(d.count, [&](long i, long count) {
        const auto store = [to = sums + i * row + j, row](int r, int half, __m512 sum) {
          float* at = to + r * row + 16 * half;
          _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sum));
        };
        some_rows(count, {left + i, 1, line}, right, kColumns, (end - start + 1) / 2, store, ahead.fetch());
      });
    }
  }
  return true;
}

// Whether there was memory for work() in every thread.
template <typename Work>
bool in_all_threads(Work work) {
  bool enough = true;
#pragma omp parallel
  if (!work())
#pragma omp atomic write
    enough = false;
  return enough;
}

}  // namespace

// Y = X W^T and dX = dY W; the weight W is (outputs, inputs), and `panels` room for as many bfloat16, at the start of
// a cache line. Sizes: rows, outputs, inputs. Both return whether memory was lacking.
#define EXPORT(name, Weight)                                                                               \
  extern "C" int linear_outputs_##name(const BFloat16* x, const Weight* weight, Word* panels, BFloat16* y, \
                                       const long* n) {                                                    \
    return !in_all_threads([=] {                                                                           \
      lay_out_outputs(weight, n[1], n[2], panels);                                                         \
      return multiply(x, panels, y, n[0], n[2], n[1]);                                                     \
    });                                                                                                    \
  }                                                                                                        \
  extern "C" int linear_input_gradient_##name(const BFloat16* d_y, const Weight* weight, Word* panels,     \
                                              BFloat16* d_x, const long* n) {                              \
    return !in_all_threads([=] {                                                                           \
      lay_out_inputs(weight, n[1], n[2], panels);                                                          \
      return multiply(d_y, panels, d_x, n[0], n[1], n[2]);                                                 \
    });                                                                                                    \
  }
EXPORT(float32, float)
EXPORT(bfloat16, BFloat16)

// dW = dY^T X, (outputs, inputs), in as many blocks, of the longer side, as asked. Returns whether memory was lacking.
extern "C" int linear_weight_gradient(const BFloat16* d_y, const BFloat16* x, float* d_weight, const long* n) {
  const long rows = n[0], outputs = n[1], inputs = n[2], blocks = n[3];
  const bool by_outputs = outputs >= inputs;
  const long unit = by_outputs ? 16 : kColumns, units = (by_outputs ? outputs : inputs) / unit;
  bool enough = true;
#pragma omp parallel for schedule(static)
  for (long block = 0; block < blocks; ++block) {
    const long first = units * block / blocks * unit, count = units * (block + 1) / blocks * unit - first;
    const Columns d{d_y, rows, outputs, by_outputs ? first : 0, by_outputs ? count : outputs};
    const Columns of_x{x, rows, inputs, by_outputs ? 0 : first, by_outputs ? inputs : count};
    float* sums = d_weight + d.first * inputs + of_x.first;
    if (!sum_outer(d, of_x, sums, inputs))
#pragma omp atomic write
      enough = false;
  }
  return !enough;
}
