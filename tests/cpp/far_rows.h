// Rows that lie further apart than 32 bits can count must give what near rows give.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"

namespace natrpb::test {

// `results_at_stride(memory, stride)` fills 16-bit tensors of three rows, `stride` elements apart, runs ops on them, and returns
// what they wrote. Their columns take less than 128 elements together with the gap. Memory between far rows is never touched.
template <class F>
void test_offsets_beyond_32_bits(F results_at_stride) {
  constexpr int64_t kNear = 128, kFar = (int64_t{1} << 30) + kNear;  // the third row lies beyond 2^31 elements
  constexpr size_t kBytes = 2 * sizeof(uint16_t) * kFar + 4096;
  std::vector<uint16_t> compact(4 * kNear);
  void* sparse = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  check(sparse != MAP_FAILED, [] { return "no address space for the sparse tensor"; });
  if (sparse == MAP_FAILED) return;
  const bool same = results_at_stride(static_cast<uint16_t*>(sparse), kFar) == results_at_stride(compact.data(), kNear);
  check(same, [] { return "strides beyond 32 bits change results"; });
  munmap(sparse, kBytes);
}

}  // namespace natrpb::test
