// gelu(x) * y and its gradients, in bfloat16, computed in float32: the middle of a gated feed-forward network.
//
// GELU in tanh's approximation is x * s with s = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
// Compiled by native.py for the processor it runs on; needs AVX-512 with bfloat16.

#include <immintrin.h>

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

}  // namespace

// Of n elements, a multiple of 16.
extern "C" void gated_gelu(const BFloat16* x, const BFloat16* y, BFloat16* out, long n) {
#pragma omp parallel for schedule(static)
  for (long i = 0; i < n; i += 16) {
    const __m512 a = widen(x + i);
    const __m512 gelu = _mm512_mul_ps(a, sigmoid_of_twice_u(a, _mm512_mul_ps(a, a)));
    narrow(out + i, _mm512_mul_ps(gelu, widen(y + i)));
  }
}

extern "C" void gated_gelu_backward(const BFloat16* x, const BFloat16* y, const BFloat16* d_out, BFloat16* d_x,
                                    BFloat16* d_y, long n) {
#pragma omp parallel for schedule(static)
  for (long i = 0; i < n; i += 16) {
    const __m512 a = widen(x + i), square = _mm512_mul_ps(a, a), s = sigmoid_of_twice_u(a, square);
    const __m512 gelu = _mm512_mul_ps(a, s), gradient = widen(d_out + i);
    const __m512 slope = _mm512_fmadd_ps(square, constant(3 * kSlope * kCubic), constant(kSlope));  // of 2 u
    const __m512 derivative = _mm512_fmadd_ps(_mm512_mul_ps(gelu, slope), _mm512_sub_ps(constant(1), s), s);
    narrow(d_y + i, _mm512_mul_ps(gradient, gelu));
    narrow(d_x + i, _mm512_mul_ps(_mm512_mul_ps(gradient, widen(y + i)), derivative));
  }
}
