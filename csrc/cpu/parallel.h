// Threads and their scratch memory, as every launcher uses them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "natrpb/local_attention.h"

namespace natrpb::cpu {

// A thread's scratch memory, 64-byte aligned, kept between calls: fresh pages would cost more than many a call computes.
// Returns nullptr where there is not enough.
inline void* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local int64_t size = 0;
  if (size < bytes) {
    buffer.reset();
    size = 0;
    buffer.reset(std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64));
    size = buffer ? bytes : 0;
  }
  return buffer.get();
}

// Calls body(begin, end) over disjoint ranges that cover [0, count).
template <class F>
void run_parallel(ParallelFor parallel_for, int64_t count, F body) {
  parallel_for(count, &body, [](void* f, int64_t begin, int64_t end) { (*static_cast<F*>(f))(begin, end); });
}

}  // namespace natrpb::cpu
