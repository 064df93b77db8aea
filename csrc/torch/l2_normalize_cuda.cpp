// L2 normalisation on CUDA.
#include "device_cuda.h"
#include "l2_normalize_ops.h"

namespace {

using natrpb::L2NormalizeParams;
using natrpb::Status;
using natrpb::binding::CudaDevice;
namespace cuda = natrpb::cuda;

struct Cuda : CudaDevice {
  using CudaDevice::CudaDevice;

  using Params = L2NormalizeParams;
  int64_t l2_normalize_backward_workspace(const Params& p) const { return cuda::l2_normalize_backward_workspace(p); }
  Status l2_normalize(const Params& p) const { return cuda::l2_normalize(p, stream()); }
  Status l2_normalize_backward(const Params& p) const { return cuda::l2_normalize_backward(p, stream()); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(natrpb, NATRPB_CUDA_KEY, m) { natrpb::binding::L2NormalizeOps<Cuda>::implement(m); }
