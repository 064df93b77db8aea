// Where a CUDA op runs: the device of its first tensor, made current while the op lasts, and torch's current stream on it.
//
// With NATRPB_EMULATOR (tests only) the kernels are host code that runs at once on CPU tensors, and there is neither.
#pragma once

#include "tensors.h"

#ifdef NATRPB_EMULATOR
#define NATRPB_CUDA_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define NATRPB_CUDA_KEY CUDA

// In libtorch_cuda alone. Weak, so that this library also loads, unused, beside a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace natrpb::binding {

#ifdef NATRPB_EMULATOR

class CudaDevice {
 public:
  CudaDevice(const char* name, const Tensor& model) { check_device(name, model); }
  void check_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU, where the emulator runs");
  }
  void* stream() const { return nullptr; }
};

#else

class CudaDevice {
 public:
  CudaDevice(const char* name, const Tensor& model) : index_(checked_index(name, model)), guard_(index_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_) == AOTI_TORCH_SUCCESS,
                    "torch gave no current stream of cuda:", index_);
  }
  void check_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == index_, name, " must be on cuda:", index_,
                    " like the other tensors, got ",
                    t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device");
  }
  void* stream() const { return stream_; }

 private:
  static int32_t checked_index(const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), name, " must be on the CUDA device of the other tensors");
    return t.get_device_index();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

}  // namespace natrpb::binding
