// What kernels with and without AVX-512 share: memory to work in, the share of a thread, and softmax.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

constexpr long kLine = 64;  // bytes of a cache line

// Memory of the calling thread that grows and stays: asked for anew at each call, it would be zeroed by the kernel.
template <typename T>
T* scratch(std::size_t count) {
  thread_local std::unique_ptr<T, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local std::size_t capacity = 0;
  if (count > capacity) {
    memory.reset(static_cast<T*>(std::aligned_alloc(kLine, (count * sizeof(T) + kLine - 1) / kLine * kLine)));
    capacity = memory ? count : 0;
  }
  return memory.get();
}

// This thread's share of `count` equal pieces of work.
struct Share {
  long begin, end;
  explicit Share(long count) {
    const long threads = omp_get_num_threads(), thread = omp_get_thread_num();
    begin = count * thread / threads;
    end = count * (thread + 1) / threads;
  }
};

struct BFloat16 {
  std::uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Of the scores of a query, in place, after its bias is added, if any.
template <typename T>
void softmax(float* row, const T* bias, long end) {
  if (bias)
    for (long s = 0; s < end; ++s) row[s] += widen(bias[s]);
  float highest = row[0];
  for (long s = 1; s < end; ++s) highest = std::max(highest, row[s]);
  float total = 0;
  for (long s = 0; s < end; ++s) total += row[s] = std::exp(row[s] - highest);
  const float scale = 1 / total;
  for (long s = 0; s < end; ++s) row[s] *= scale;
}

}  // namespace
