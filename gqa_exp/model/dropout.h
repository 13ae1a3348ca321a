// Which elements dropout keeps, for the kernels of whole sequences: drawn from a seed and an element's place alone, so
// that the backward pass draws the same again, and nothing is stored.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3): of a
// key, the seed, and a counter it makes four words of 32 bits. Each of their halves is for an element.
class Dropout {
 public:
  static constexpr long elements = 64;  // whose numbers are drawn together
  static constexpr long all = 1 << 16;  // of an element's numbers

  // Drops an element if its number is one of the lowest `dropped`, in [0, 65536). Without a seed, none.
  Dropout(const std::int64_t* seed, long dropped)
      : on_(seed != nullptr),
        dropped_(dropped),
        key_{on_ ? static_cast<std::uint32_t>(*seed) : 0, on_ ? static_cast<std::uint32_t>(*seed >> 32) : 0} {}

  // What is kept is multiplied by this, so that its mean stays.
  float scale() const { return on_ ? static_cast<float>(all) / static_cast<float>(all - dropped_) : 1; }

  // A bit for each element of a block of 64, the first lowest. Its counters are the eight from eight times the block
  // on.
  std::uint64_t kept(std::uint64_t block) const {
    if (!on_) return ~std::uint64_t{0};
    const __m512i each = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(8 * block)), each);
    // A word in the lower half of each of eight lanes; what is in the upper half does not matter.
    __m512i words[4] = {counter, _mm512_srli_epi64(counter, 32), _mm512_setzero_si512(), _mm512_setzero_si512()};
    std::uint32_t low = key_[0], high = key_[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      const __m512i first = _mm512_mul_epu32(words[0], _mm512_set1_epi64(0xD2511F53));
      const __m512i second = _mm512_mul_epu32(words[2], _mm512_set1_epi64(0xCD9E8D57));
      words[0] = exclusive_or(_mm512_srli_epi64(second, 32), words[1], _mm512_set1_epi64(low));
      words[1] = second;
      words[2] = exclusive_or(_mm512_srli_epi64(first, 32), words[3], _mm512_set1_epi64(high));
      words[3] = first;
    }
    return kept_of(words[0], words[1]) | static_cast<std::uint64_t>(kept_of(words[2], words[3])) << 32;
  }

 private:
  static __m512i exclusive_or(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  std::uint32_t kept_of(__m512i even, __m512i odd) const {
    const __m512i numbers = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    return _mm512_cmpge_epu16_mask(numbers, _mm512_set1_epi16(static_cast<short>(dropped_)));
  }

  bool on_;
  long dropped_;
  std::uint32_t key_[2];
};

}  // namespace
