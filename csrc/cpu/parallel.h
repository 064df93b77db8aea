// Threads and their scratch memory, as every launcher uses them.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "natrpb/local_attention.h"
#include "natrpb/status.h"

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

// Calls item(index, scratch) once for every index of [0, items); `bytes` of scratch memory for each thread.
//
// A thread takes the range that it is given in order, then from the end what others have not begun: a core that is slow, busy
// with other work or late to wake up holds nobody up.
template <class F>
Status run_items(ParallelFor parallel_for, int64_t items, int64_t bytes, F item) {
  std::vector<std::atomic<bool>> begun(static_cast<size_t>(items));
  std::atomic<bool> out_of_memory = false;
  auto run = [&](int64_t begin, int64_t end) {
    void* scratch = bytes ? thread_scratch(bytes) : nullptr;
    if (bytes && !scratch) {
      out_of_memory = true;
      return;
    }
    const auto take = [&](int64_t index) {
      std::atomic<bool>& taken = begun[static_cast<size_t>(index)];
      if (!taken.load(std::memory_order_relaxed) && !taken.exchange(true, std::memory_order_relaxed)) item(index, scratch);
    };
    for (int64_t index = begin; index < end; ++index) take(index);
    for (int64_t index = items; index-- > 0;) take(index);
  };
  parallel_for(items, &run, [](void* f, int64_t begin, int64_t end) { (*static_cast<decltype(run)*>(f))(begin, end); });
  if (out_of_memory) return Status::error("out of memory: a thread needs " + std::to_string(bytes) + " bytes of scratch");
  return {};
}

}  // namespace natrpb::cpu
