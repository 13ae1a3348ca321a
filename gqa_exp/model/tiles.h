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

// C = A B, or S + A B where there are sums S, for one or two tiles of rows and two of columns. Lines of B are `line` words
// apart, rows of S and C `from_row` and `row` numbers; steps are a multiple of 16.
//
// Calls between(step) after each product of two tiles, all steps / 8 or steps / 4 times, at equal distances from 0 on. On
// a core that another thread shares, as it can in a virtual machine, products come faster for what is done between them.
template <int Tall, typename Between>
inline void product_of_tiles(LeftTiles a, const Word* b, long line, long steps, const float* from, long from_row, float* c,
                             long row, Between between) {
  const long a_bytes = a.row * 4, b_bytes = line * 4, from_bytes = from_row * 4, c_bytes = row * 4;
  asm volatile("" : : : "memory");  // as in TileShapes::load
  if (from) {
    _tile_loadd(0, from, from_bytes);
    _tile_loadd(1, from + kTile, from_bytes);
    if constexpr (Tall == 2) {
      _tile_loadd(2, from + kTile * from_row, from_bytes);
      _tile_loadd(3, from + kTile * from_row + kTile, from_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Tall == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  constexpr long each = kTile / (2 * Tall);
  for (long p = 0; p < steps; p += kTile, a.words += a.step) {
    _tile_loadd(4, a.words, a_bytes);
    if constexpr (Tall == 2) _tile_loadd(5, a.words + a.below, a_bytes);
    _tile_loadd(6, b + p * line, b_bytes);
    _tile_loadd(7, b + p * line + kTile, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    between(p);
    _tile_dpbf16ps(1, 4, 7);
    between(p + each);
    if constexpr (Tall == 2) {
      _tile_dpbf16ps(2, 5, 6);
      between(p + 2 * each);
      _tile_dpbf16ps(3, 5, 7);
      between(p + 3 * each);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kTile, c_bytes);
  if constexpr (Tall == 2) {
    _tile_stored(2, c + kTile * row, c_bytes);
    _tile_stored(3, c + kTile * row + kTile, c_bytes);
  }
}

#else

struct WholeTiles {
  WholeTiles() {}
};

template <int Tall, typename Between>
inline void product_of_tiles(LeftTiles, const Word*, long, long, const float*, long, float*, long, Between) {}  // never called

#endif

}  // namespace
