// L2 normalisation on the CPU.
#include "device_cpu.h"
#include "l2_normalize_ops.h"

namespace {

using natrpb::L2NormalizeParams;
using natrpb::Status;
using natrpb::binding::CpuDevice;
namespace cpu = natrpb::cpu;

struct Cpu : CpuDevice {
  using CpuDevice::CpuDevice;

  using Params = L2NormalizeParams;
  int64_t l2_normalize_backward_workspace(const Params& p) const { return cpu::l2_normalize_backward_workspace(p); }
  Status l2_normalize(const Params& p) const { return cpu::l2_normalize(p, parallel_for); }
  Status l2_normalize_backward(const Params& p) const { return cpu::l2_normalize_backward(p, parallel_for); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(natrpb, CPU, m) { natrpb::binding::L2NormalizeOps<Cpu>::implement(m); }
