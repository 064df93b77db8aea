// The local-attention ops on the CPU.
#include "device_cpu.h"
#include "local_attention_ops.h"

namespace {

using natrpb::LocalAttentionParams;
using natrpb::Status;
using natrpb::binding::CpuDevice;
namespace cpu = natrpb::cpu;

struct Cpu : CpuDevice {
  using CpuDevice::CpuDevice;

  using Params = LocalAttentionParams;
  int64_t local_attention_forward_workspace(const Params&) const { return 0; }
  int64_t local_attention_backward_workspace(const Params& p) const { return cpu::local_attention_backward_workspace(p); }
  int64_t local_bias_grad_workspace(const Params& p) const { return cpu::local_bias_grad_workspace(p); }
  bool local_attention_backward_is_wide(const Params& p) const { return cpu::local_attention_backward_is_wide(p); }
  bool local_av_transposed_is_wide(const Params& p) const { return cpu::local_av_transposed_is_wide(p); }

  Status local_attention_forward(const Params& p) const { return cpu::local_attention_forward(p, parallel_for); }
  Status local_attention_backward(const Params& p) const { return cpu::local_attention_backward(p, parallel_for); }
  Status local_qk(const Params& p) const { return cpu::local_qk(p, parallel_for); }
  Status local_av(const Params& p) const { return cpu::local_av(p, parallel_for); }
  Status local_av_transposed(const Params& p) const { return cpu::local_av_transposed(p, parallel_for); }
  Status local_bias_grad(const Params& p) const { return cpu::local_bias_grad(p, parallel_for); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(natrpb, CPU, m) { natrpb::binding::LocalAttentionOps<Cpu>::implement(m); }
