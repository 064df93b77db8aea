// Where a CPU op runs: on torch's threads.
#pragma once

#include "tensors.h"

namespace natrpb::binding {

struct CpuDevice {
  CpuDevice(const char* name, const Tensor& model) { check_device(name, model); }
  void check_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU like the other tensors");
  }
  static void parallel_for(int64_t count, void* body, void (*call)(void*, int64_t, int64_t)) {
    torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { call(body, begin, end); });
  }
};

}  // namespace natrpb::binding
