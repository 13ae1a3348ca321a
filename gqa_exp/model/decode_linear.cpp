// What a decode step computes from its few rows x, at the speed at which the weights are read from memory:
//
//   y = (x, normalised if asked) W^T, then gelu(first half) * (second half) if asked, then + residual if asked
//
// Weights are packed by native.py in the order in which they are read here, 32 outputs at a time; every thread takes a
// share of the outputs. Sums are float32. Compiled for the processor it runs on, which must have AVX-512 with bfloat16;
// where it has AMX too, bfloat16 is multiplied in tiles.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "tiles.h"
#include "vectors.h"

namespace {

constexpr long kOutputs = 32;  // outputs computed at a time

template <typename T>
struct Call {
  const T *x, *norm, *weights, *residual;  // (rows, inputs), (inputs) or null, packed, (rows, results) or null
  T* y;                                    // (rows, results)
  long rows, inputs, outputs, gated;       // results: outputs, or half as many if gated
  float epsilon;                           // of the norm

  // T5's norm: no mean is taken away and nothing is added (Raffel et al. 2020, section 2.1).
  float scale_of(long row) const {
    if (!norm) return 1;
    __m512 squares = _mm512_setzero_ps();
    for (long k = 0; k < inputs; k += 16) {
      const __m512 value = widen(x + row * inputs + k);
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    return 1 / std::sqrt(_mm512_reduce_add_ps(squares) / inputs + epsilon);
  }

  // 16 inputs of a row, normalised.
  __m512 input(long row, long k, float scale) const {
    const __m512 value = widen(x + row * inputs + k);
    return norm ? _mm512_mul_ps(_mm512_mul_ps(value, _mm512_set1_ps(scale)), widen(norm + k)) : value;
  }

  // From the 32 sums of a row and block to its results.
  void store(const float* sums, long row, long block) const {
    alignas(kLine) float gate[16];
    const long results = gated ? outputs / 2 : outputs, vectors = gated ? 1 : 2;
    for (long half = 0; half < vectors; ++half) {
      __m512 value = _mm512_load_ps(sums + 16 * half);
      if (gated) {
        // gelu in tanh's approximation, which is x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))). No infinite power, by
        // which -ffast-math divides to NaN: from here on x times its inverse is zero to any float32 that it is added to.
#pragma omp simd simdlen(16)
        for (int i = 0; i < 16; ++i) {
          const float g = sums[i];
          gate[i] = g / (1 + std::exp(std::min(80.0f, -1.5957691216057308f * (g + 0.044715f * g * g * g))));
        }
        value = _mm512_mul_ps(_mm512_load_ps(gate), _mm512_load_ps(sums + 16));
      }
      const long at = row * results + block * 16 * vectors + 16 * half;
      if (residual) value = _mm512_add_ps(value, widen(residual + at));
      narrow(y + at, value);
    }
  }
};

// ---- with vectors: eight rows a pass; more rows meet a chunk of the weights in the first cache, and the processor's
// arithmetic is the limit. A unit is four bytes of inputs: one float32, or a pair of bfloat16.

constexpr long kRows = 8;
constexpr long kTogether = 8;  // passes that go through the chunks in turn; their sums are on the stack, 8 KiB
constexpr long kUnit = 4, kUnits = 16;  // bytes of a unit, units of a vector
constexpr long kChunk = 128;   // units summed before their sum is added: half as far from the exact result as one chain
constexpr long kSoon = 16;     // units ahead that are fetched into the first cache, if eager
constexpr int kUnrolled = kEager ? 4 : 1;  // units; with kSoon, float32 is 6 % faster; else not tried

template <typename T>
constexpr long kPerUnit = sizeof(float) / sizeof(T);

inline __m512 add_product(__m512 sum, float x, const float* w) {
  return _mm512_fmadd_ps(_mm512_set1_ps(x), _mm512_load_ps(w), sum);
}
inline __m512 add_product(__m512 sum, float x, const BFloat16* w) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(_mm512_set1_ps(x)), (__m512bh)_mm512_load_si512(w));
}

// Adds the products of a chunk to the sums (kRows, 32), and meanwhile fetches, into the second cache, `share` bytes per
// unit from `later` on: without it weights were read at 20 GB/s of 32, with it at 27. If eager, what comes soon is fetched
// into the first, too.
// x: (units, kRows); w, and 16 outputs on, `high` units behind: a vector per unit, `step` units from one to the next
template <typename T>
inline void multiply(const float* x, const T* w, long high, long step, long units, const char* later, long share,
                     float* sums) {
  __m512 low_sums[kRows], high_sums[kRows];  // registers
  for (long row = 0; row < kRows; ++row) low_sums[row] = high_sums[row] = _mm512_setzero_ps();
#pragma GCC unroll kUnrolled
  for (long k = 0; k < units; ++k, x += kRows, w += step * kPerUnit<T>, later += share) {
    const T* w_high = w + high * kPerUnit<T>;
    _mm_prefetch(later, _MM_HINT_T1);
    _mm_prefetch(later + high * kUnit, _MM_HINT_T1);
    if constexpr (kEager) {
      _mm_prefetch(w + kSoon * step * kPerUnit<T>, _MM_HINT_T0);
      _mm_prefetch(w_high + kSoon * step * kPerUnit<T>, _MM_HINT_T0);
    }
    for (long row = 0; row < kRows; ++row) {
      low_sums[row] = add_product(low_sums[row], x[row], w);
      high_sums[row] = add_product(high_sums[row], x[row], w_high);
    }
  }
  for (long row = 0; row < kRows; ++row) {
    float* sum = sums + row * kOutputs;
    _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), low_sums[row]));
    _mm512_store_ps(sum + 16, _mm512_add_ps(_mm512_load_ps(sum + 16), high_sums[row]));
  }
}

template <typename T>
int linear_by_vectors(const Call<T>& call) {
  const long rows = call.rows, units = call.inputs / kPerUnit<T>, passes = (rows + kRows - 1) / kRows;
  // Packed as (outputs / 32, inputs, 32), or in tiles of 16 outputs.
  const bool tiles = kPerUnit<T> > 1;
  const long high = tiles ? units * kUnits : kUnits, step = tiles ? kUnits : 2 * kUnits;
  float* turned = scratch<float>(passes * kRows * units);  // (passes, units, kRows)
  if (!turned) return 1;
#pragma omp parallel
  {
    const Share columns(call.inputs / 16), blocks(call.outputs / kOutputs);
    for (long row = 0; row < passes * kRows; ++row) {
      const float scale = row < rows ? call.scale_of(row) : 0;
      for (long column = columns.begin; column < columns.end; ++column) {
        alignas(kLine) float values[16] = {};
        if (row < rows) narrow(reinterpret_cast<T*>(values), call.input(row, column * 16, scale));
        const long first = row / kRows * units + column * 16 / kPerUnit<T>;
        for (long i = 0; i < 16 / kPerUnit<T>; ++i) turned[(first + i) * kRows + row % kRows] = values[i];
      }
    }
#pragma omp barrier
    for (long block = blocks.begin; block < blocks.end; ++block)
      for (long pass = 0; pass < passes; pass += kTogether) {
        const long together = std::min(kTogether, passes - pass);
        alignas(kLine) float sums[kTogether * kRows * kOutputs];
        std::fill(sums, sums + together * kRows * kOutputs, 0.0f);
        const T* w = call.weights + block * kOutputs * call.inputs;
        for (long first = 0; first < units; first += kChunk) {
          const long here = std::min(kChunk, units - first), share = step * kUnit / together;
          const T* chunk = w + first * step * kPerUnit<T>;
          const T* next = first + here < units ? chunk + here * step * kPerUnit<T> : w + kOutputs * call.inputs;
          for (long i = 0; i < together; ++i)
            multiply(turned + ((pass + i) * units + first) * kRows, chunk, high, step, here,
                     reinterpret_cast<const char*>(next) + i * here * share, share, sums + i * kRows * kOutputs);
        }
        for (long row = 0; row < std::min(together * kRows, rows - pass * kRows); ++row)
          call.store(sums + row * kOutputs, pass * kRows + row, block);
      }
  }
  return 0;
}

int linear(const Call<float>& call) { return linear_by_vectors(call); }

// ---- with AMX: tiles of 16 rows by 32 inputs times tiles of 32 inputs by 16 outputs, two of each at a time

#ifdef __AMX_BF16__

constexpr long kTileRows = kTile, kTileInputs = 2 * kTile, kTileOutputs = kTile, kElements = kTileRows * kTileInputs;
constexpr long kTilesAhead = 4;  // that are fetched into the first cache
constexpr long kFar = 1024;      // inputs ahead that are fetched into the second; 512 to 4096 measured the same

// Fetches rows of a tile into the first cache, and of another into the second.
template <int Rows>
inline void fetch(const BFloat16* soon, const BFloat16* later, int first) {
#pragma GCC unroll 16
  for (long line = first; line < first + Rows; ++line) {
    _mm_prefetch(soon + line * kTileInputs, _MM_HINT_T0);
    _mm_prefetch(later + line * kTileInputs, _MM_HINT_T1);
  }
}

// Sums of one or two tiles of rows and two of outputs, whose weights are read once for them. Meanwhile the next ones are
// fetched: without it T5-Base's were read at 16 GB/s of 25, with it at 22 to 25.
// x: (inputs / 32, Tiles, 16, 32); w: two times (inputs / 32, tile)
template <int Tiles>
inline void multiply(const BFloat16* x, const BFloat16* w, long inputs, float* sums) {
  const BFloat16* next = w + inputs * kTileOutputs;
  const long far = std::min(kFar, inputs);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Tiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < inputs; k += kTileInputs, x += Tiles * kElements, w += kElements, next += kElements) {
    const long ahead = far + (k + far < inputs ? 0 : inputs);  // past their end come those of the next block
    constexpr int part = kTileRows / Tiles;  // of a tile to fetch after each product
    const BFloat16 *soon = w + kTilesAhead * kElements, *later = w + ahead * kTileOutputs;
    const BFloat16 *next_soon = next + kTilesAhead * kElements, *next_later = next + ahead * kTileOutputs;
    _tile_loadd(4, x, kLine);
    if constexpr (Tiles == 2) _tile_loadd(5, x + kElements, kLine);
    _tile_loadd(6, w, kLine);
    _tile_loadd(7, next, kLine);
    _tile_dpbf16ps(0, 4, 6);
    fetch<part>(soon, later, 0);
    _tile_dpbf16ps(1, 4, 7);
    fetch<part>(next_soon, next_later, 0);
    if constexpr (Tiles == 2) {
      _tile_dpbf16ps(2, 5, 6);
      fetch<part>(soon, later, part);
      _tile_dpbf16ps(3, 5, 7);
      fetch<part>(next_soon, next_later, part);
    }
  }
  _tile_stored(0, sums, 2 * kLine);
  _tile_stored(1, sums + kTileOutputs, 2 * kLine);
  if constexpr (Tiles == 2) {
    _tile_stored(2, sums + kTileRows * kOutputs, 2 * kLine);
    _tile_stored(3, sums + kTileRows * kOutputs + kTileOutputs, 2 * kLine);
  }
}

// The rows of x in tiles, two tiles side by side as far as there are two: (pairs, inputs / 32, 2, 16, 32).
inline BFloat16* tile_of(BFloat16* tiled, long row, long k, long rows, long inputs) {
  const long pair = row / (2 * kTileRows), in_pair = std::min(2L, (rows - pair * 2 * kTileRows + kTileRows - 1) / kTileRows);
  const long tile = row / kTileRows % 2, column = k / kTileInputs;
  return tiled + pair * 2 * kTileRows * inputs + (column * in_pair + tile) * kElements + row % kTileRows * kTileInputs;
}

int linear_by_tiles(const Call<BFloat16>& call) {
  const long rows = call.rows, inputs = call.inputs, pairs = (rows + 2 * kTileRows - 1) / (2 * kTileRows);
  BFloat16* tiled = scratch<BFloat16>(pairs * 2 * kTileRows * inputs);  // rows beyond the last: their sums are not kept
  if (!tiled) return 1;
#pragma omp parallel
  {
    const Share columns(inputs / kTileInputs), blocks(call.outputs / kOutputs);
    for (long row = 0; row < rows; ++row) {
      const float scale = call.scale_of(row);
      for (long k = columns.begin * kTileInputs; k < columns.end * kTileInputs; k += 16)
        narrow(tile_of(tiled, row, k, rows, inputs) + k % kTileInputs, call.input(row, k, scale));
    }
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kLine;
      shapes.rows[tile] = tile < 6 ? std::min(kTileRows, rows) : kTileRows;  // of sums and x; of weights
    }
    shapes.load();
#pragma omp barrier
    for (long block = blocks.begin; block < blocks.end; ++block)
      for (long pair = 0; pair < pairs; ++pair) {
        alignas(kLine) float sums[2 * kTileRows * kOutputs];
        const long first = pair * 2 * kTileRows, here = std::min(2 * kTileRows, rows - first);
        const BFloat16 *x = tiled + first * inputs, *w = call.weights + block * kOutputs * inputs;
        if (here > kTileRows)
          multiply<2>(x, w, inputs, sums);
        else
          multiply<1>(x, w, inputs, sums);
        for (long row = 0; row < here; ++row) call.store(sums + row * kOutputs, first + row, block);
      }
    _tile_release();
  }
  return 0;
}

#endif

int linear(const Call<BFloat16>& call) {
#ifdef __AMX_BF16__
  if (in_tiles) return linear_by_tiles(call);
#endif
  return linear_by_vectors(call);
}

}  // namespace

extern "C" {
bool in_tiles = false;
}

#define EXPORT(name, T)                                                                                             \
  extern "C" int name(const T* x, const T* norm, const T* weights, const T* residual, T* y, const long* sizes,      \
                      float epsilon) {                                                                              \
    return linear(Call<T>{x, norm, weights, residual, y, sizes[0], sizes[1], sizes[2], sizes[3], epsilon});         \
  }
EXPORT(linear_float32, float)
EXPORT(linear_bfloat16, BFloat16)

// Whether to multiply in tiles from now on, if the processor has them and Linux grants them; returns whether it is so.
extern "C" int use_tiles(int wanted) {
#ifdef __AMX_BF16__
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  in_tiles = wanted && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  (void)wanted;
#endif
  return in_tiles;
}
