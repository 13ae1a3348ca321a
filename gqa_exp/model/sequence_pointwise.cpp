// What is done element by element, computed in float32: dropout, and in bfloat16 the middle of a gated feed-forward
// network, gelu(x) * y with dropout, and its gradients.
//
// GELU in tanh's approximation is x * s with s = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
// Compiled by native.py for the processor it runs on; needs AVX-512 with bfloat16.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "dropout.h"
#include "vectors.h"

namespace {

constexpr float kSlope = 1.5957691216057308f, kCubic = 0.044715f;  // 2 u = kSlope (x + kCubic x^3)

inline __m512 constant(float x) { return _mm512_set1_ps(x); }

inline __m512 sigmoid_of_twice_u(__m512 x, __m512 square) {
  const __m512 factor = _mm512_fmadd_ps(square, constant(kCubic), constant(1));
  const __m512 twice_u = _mm512_mul_ps(_mm512_mul_ps(x, constant(kSlope)), factor);
  const __m512 power = _mm512_min_ps(constant(1000), _mm512_sub_ps(_mm512_setzero_ps(), twice_u));
  return _mm512_div_ps(constant(1), _mm512_add_ps(constant(1), exponential(power)));
}

// Calls work(i, factors) for each 16 of n elements, those from i on. The factors are zero or dropout's scale, so that
// what is no number shows though it is dropped.
template <typename Work>
void by_vectors(long n, const Dropout& dropout, Work work) {
  const float scale = dropout.scale();
#pragma omp parallel for schedule(static)
  for (long block = 0; block < (n + Dropout::elements - 1) / Dropout::elements; ++block) {
    std::uint64_t kept = dropout.kept(block);
    const long end = std::min(n, (block + 1) * Dropout::elements);
    for (long i = block * Dropout::elements; i < end; i += 16, kept >>= 16)
      work(i, _mm512_maskz_mov_ps(static_cast<__mmask16>(kept), constant(scale)));
  }
}

template <typename Number>
void drop(const Number* x, Number* out, long n, const Dropout& dropout) {
  by_vectors(n, dropout, [=](long i, __m512 factors) {
    const __mmask16 there = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
    narrow(out + i, _mm512_mul_ps(widen(x + i, there), factors), there);
  });
}

}  // namespace

// Of n elements; for a seed and `dropped`, see dropout.h.
extern "C" void dropout_float32(const std::int64_t* seed, long dropped, const float* x, float* out, long n) {
  drop(x, out, n, {seed, dropped});
}
extern "C" void dropout_bfloat16(const std::int64_t* seed, long dropped, const BFloat16* x, BFloat16* out, long n) {
  drop(x, out, n, {seed, dropped});
}

// The same, of a multiple of 16 elements; the seed may be null.
extern "C" void gated_gelu(const std::int64_t* seed, long dropped, const BFloat16* x, const BFloat16* y, BFloat16* out,
                           long n) {
  by_vectors(n, {seed, dropped}, [=](long i, __m512 factors) {
    const __m512 a = widen(x + i);
    const __m512 gelu = _mm512_mul_ps(a, sigmoid_of_twice_u(a, _mm512_mul_ps(a, a)));
    narrow(out + i, _mm512_mul_ps(_mm512_mul_ps(gelu, widen(y + i)), factors));
  });
}

extern "C" void gated_gelu_backward(const std::int64_t* seed, long dropped, const BFloat16* x, const BFloat16* y,
                                    const BFloat16* d_out, BFloat16* d_x, BFloat16* d_y, long n) {
  by_vectors(n, {seed, dropped}, [=](long i, __m512 factors) {
    const __m512 a = widen(x + i), square = _mm512_mul_ps(a, a), s = sigmoid_of_twice_u(a, square);
    const __m512 gelu = _mm512_mul_ps(a, s), gradient = _mm512_mul_ps(widen(d_out + i), factors);
    const __m512 slope = _mm512_fmadd_ps(square, constant(3 * kSlope * kCubic), constant(kSlope));  // of 2 u
    const __m512 derivative = _mm512_fmadd_ps(_mm512_mul_ps(gelu, slope), _mm512_sub_ps(constant(1), s), s);
    narrow(d_y + i, _mm512_mul_ps(gradient, gelu));
    narrow(d_x + i, _mm512_mul_ps(_mm512_mul_ps(gradient, widen(y + i)), derivative));
  });
}
