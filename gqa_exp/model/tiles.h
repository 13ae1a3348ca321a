// Products of bfloat16 matrices in tiles, for processors with AMX: 16 rows of 16 words times 16 words of 16 columns.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common.h"

extern "C" bool in_tiles;  // whether to multiply in tiles; set by use_tiles in decode_linear.cpp

namespace {

using Word = std::uint32_t;  // a pair of bfloat16 along the summed axis

constexpr long kTile = 16;  // rows of a tile, and words of its rows
constexpr long kTileWords = kTile * kTile;

// The left side of a product. Words of a tile's row lie side by side; `row` words on is its next row, `step` words on the
// tile of the next 16 words, and `below` that of the next 16 rows.
struct LeftTiles {
  const Word* words;
  long row, step, below;
};

// Numbers of which each row is `row` after the last.
template <typename Number>
struct Numbers {
  Number* at;
  long row;
};

constexpr long kPace = 4;  // steps from one pause between products to the next

#ifdef __AMX_BF16__

struct alignas(kLine) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void load() const {
    // GCC's intrinsics do not say that they read memory, so that it would leave out what was stored there.
    asm volatile("" : : "r"(this) : "memory");
    _tile_loadconfig(this);
  }
};

// Where tiles multiply, those of the calling thread are whole ones as long as this lives.
class WholeTiles {
 public:
  WholeTiles() {
    if (!in_tiles) return;
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kLine;
      shapes.rows[tile] = kTile;
    }
    shapes.load();
  }
  ~WholeTiles() {
    if (in_tiles) _tile_release();
  }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;
};

// As product_of_tiles, for one or two tiles of rows.
template <int Tall, typename Between>
inline void product_of_rows(LeftTiles a, const Word* b, long line, long steps, Numbers<const float> sums, Numbers<float> c,
                            Between between) {
  const long a_bytes = a.row * 4, b_bytes = line * 4, sums_bytes = sums.row * 4, c_bytes = c.row * 4;
  asm volatile("" : : : "memory");  // as in TileShapes::load
  if (sums.at) {
    _tile_loadd(0, sums.at, sums_bytes);
    _tile_loadd(1, sums.at + kTile, sums_bytes);
    if constexpr (Tall == 2) {
      _tile_loadd(2, sums.at + kTile * sums.row, sums_bytes);
      _tile_loadd(3, sums.at + kTile * sums.row + kTile, sums_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Tall == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (long p = 0; p < steps; p += kTile, a.words += a.step) {
    _tile_loadd(4, a.words, a_bytes);
    if constexpr (Tall == 2) _tile_loadd(5, a.words + a.below, a_bytes);
    _tile_loadd(6, b + p * line, b_bytes);
    _tile_loadd(7, b + p * line + kTile, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    between(p);
    if constexpr (Tall == 2) _tile_dpbf16ps(2, 5, 6);
    between(p + kPace);
    _tile_dpbf16ps(1, 4, 7);
    between(p + 2 * kPace);
    if constexpr (Tall == 2) _tile_dpbf16ps(3, 5, 7);
    between(p + 3 * kPace);
  }
  _tile_stored(0, c.at, c_bytes);
  _tile_stored(1, c.at + kTile, c_bytes);
  if constexpr (Tall == 2) {
    _tile_stored(2, c.at + kTile * c.row, c_bytes);
    _tile_stored(3, c.at + kTile * c.row + kTile, c_bytes);
  }
}

// C = S + A B, or A B without sums S, of 32 columns and the first 32 rows, or 16 where there are no more; tiles are written
// whole. Lines of B are `line` words apart, steps are a multiple of 16.
//
// Calls between(step) at every fourth step, between products of tiles: where another thread works on the same core, as it
// may on the host of a virtual machine, a loop of products was 1.1 times as fast with any instructions there, and 1.3 times
// with fetches of what comes next.
template <typename Between>
inline void product_of_tiles(long rows, LeftTiles a, const Word* b, long line, long steps, Numbers<const float> sums,
                             Numbers<float> c, Between between) {
  if (rows > kTile)
    product_of_rows<2>(a, b, line, steps, sums, c, between);
  else
    product_of_rows<1>(a, b, line, steps, sums, c, between);
}

#else

struct WholeTiles {
  WholeTiles() {}
};

template <typename Between>
inline void product_of_tiles(long, LeftTiles, const Word*, long, long, Numbers<const float>, Numbers<float>, Between) {
}  // never called

#endif

}  // namespace
