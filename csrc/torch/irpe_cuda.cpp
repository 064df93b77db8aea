// The irpe ops on CUDA.
#include "device_cuda.h"
#include "irpe_ops.h"

namespace {

using natrpb::IrpeAttentionParams;
using natrpb::RpeIndexParams;
using natrpb::Status;
using natrpb::binding::CudaDevice;
using natrpb::binding::Tensor;
namespace cuda = natrpb::cuda;

struct Cuda : CudaDevice {
  using CudaDevice::CudaDevice;

  // Looking at the entries would wait for the GPU; kernels give NaN where one is out of range.
  void check_map(const char*, const Tensor&, int64_t) const {}

  Status rpe_index(const RpeIndexParams& p) const { return cuda::rpe_index(p, stream()); }
  Status rpe_index_transposed(const RpeIndexParams& p) const { return cuda::rpe_index_transposed(p, stream()); }
  int64_t irpe_attention_backward_workspace(const IrpeAttentionParams& p) const {
    return cuda::irpe_attention_backward_workspace(p);
  }
  Status irpe_attention_forward(const IrpeAttentionParams& p) const { return cuda::irpe_attention_forward(p, stream()); }
  Status irpe_attention_backward(const IrpeAttentionParams& p) const { return cuda::irpe_attention_backward(p, stream()); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(natrpb, NATRPB_CUDA_KEY, m) { natrpb::binding::IrpeOps<Cuda>::implement(m); }
