// What all kernels of this folder share: memory to work in, and the share of a thread.

#pragma once

#include <omp.h>

#include <cstdlib>
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

}  // namespace
