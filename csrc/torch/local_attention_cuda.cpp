// The local-attention ops on CUDA.
#include "device_cuda.h"
#include "local_attention_ops.h"

namespace {

using natrpb::LocalAttentionParams;
using natrpb::Status;
using natrpb::binding::CudaDevice;
namespace cuda = natrpb::cuda;

struct Cuda : CudaDevice {
  using CudaDevice::CudaDevice;

  using Params = LocalAttentionParams;
  int64_t local_attention_forward_workspace(const Params& p) const { return cuda::local_attention_forward_workspace(p); }
  int64_t local_attention_backward_workspace(const Params& p) const { return cuda::local_attention_backward_workspace(p); }
  int64_t local_bias_grad_workspace(const Params& p) const { return cuda::local_bias_grad_workspace(p); }
  bool local_attention_backward_is_wide(const Params&) const { return false; }
  bool local_av_transposed_is_wide(const Params&) const { return false; }

  Status local_attention_forward(const Params& p) const { return cuda::local_attention_forward(p, stream()); }
  Status local_attention_backward(const Params& p) const { return cuda::local_attention_backward(p, stream()); }
  Status local_qk(const Params& p) const { return cuda::local_qk(p, stream()); }
  Status local_av(const Params& p) const { return cuda::local_av(p, stream()); }
  Status local_av_transposed(const Params& p) const { return cuda::local_av_transposed(p, stream()); }
  Status local_bias_grad(const Params& p) const { return cuda::local_bias_grad(p, stream()); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(natrpb, NATRPB_CUDA_KEY, m) { natrpb::binding::LocalAttentionOps<Cuda>::implement(m); }
