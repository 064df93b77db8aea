// Launchers of the CPU kernels: cut the op into items, run them on the caller's threads, form the sums that cross items in a
// fixed order.

#include "natrpb/local_attention.h"

#include <cstring>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace natrpb::cpu {

namespace {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() == Isa::kAmx) return amx::kKernels;
  if (active_isa() == Isa::kAvx512Bf16) return avx512_bf16::kKernels;
  if (active_isa() == Isa::kAvx512) return avx512::kKernels;
  if (active_isa() == Isa::kAvx2) return avx2::kKernels;
#endif
  return portable::kKernels;
}

Plan plan_of(const LocalAttentionParams& params, Op op) {
  const Needs needs = needs_of(op, params);
  const int64_t query_channels = (needs.scores + needs.key_rows + needs.dkey) * params.head_dim;
  const int64_t value_channels = (needs.dscores + needs.value_rows + needs.dvalue) * params.value_dim;
  return make_plan(params, query_channels + value_channels);
}

bool is_empty(const LocalAttentionParams& params) {
  int64_t positions = params.batch * params.heads;
  for (const Axis& axis : params.axis) positions *= axis.length;
  return positions == 0;
}

int64_t table_entries(const LocalAttentionParams& params) {
  int64_t entries = 1;
  for (const Axis& axis : params.axis) entries *= 2 * axis.kernel_size - 1;
  return entries;
}

size_t element_bytes(const LocalAttentionParams& params) {
  return params.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
}

// drpb[head][entry] = sum of the items' tables in the order of the items.
template <class T>
void merge_bias(const LocalAttentionParams& params, const Plan& plan) {
  std::vector<double> sum(plan.table);
  const int64_t per_head = plan.groups_total * plan.boxes_total;
  for (int64_t head = 0; head < params.heads; ++head) {
    sum.assign(plan.table, 0.0);
    for (int64_t batch = 0; batch < params.batch; ++batch) {
      for (int64_t i = 0; i < per_head; ++i) {
        const int64_t index = (batch * params.heads + head) * per_head + i;
        if (locate(params, plan, index).empty) continue;
        const T* part = static_cast<const T*>(params.workspace) + index * plan.table;
        for (int64_t entry = 0; entry < plan.table; ++entry) sum[entry] += part[entry];
      }
    }
    T* to = static_cast<T*>(params.drpb) + head * plan.table;
    for (int64_t entry = 0; entry < plan.table; ++entry) to[entry] = static_cast<T>(sum[entry]);
  }
}

Status run(const LocalAttentionParams& params, Op op, ParallelFor parallel_for) {
  const Needs needs = needs_of(op, params);
  if (is_empty(params)) {
    if (needs.dbias)
      std::memset(params.drpb, 0, static_cast<size_t>(params.heads * table_entries(params)) * element_bytes(params));
    return {};
  }
  const Plan plan = plan_of(params, op);
  const int64_t bytes = kernels().scratch_bytes(params, plan, op);
  // Boxes that share keys take turns by color: the sums of one key are formed in the order of the colors.
  const int64_t bits = needs.dkey || needs.dvalue ? plan.color_bits : 0;
  for (int64_t color = 0; color <= bits; ++color) {
    if (color & ~bits) continue;  // no box has it
    const Status status = run_items(parallel_for, plan.items, bytes, [&](int64_t index, void* scratch) {
      if (!bits || locate(params, plan, index).color == color) kernels().run_item(params, plan, op, index, scratch);
    });
    if (!status.ok()) return status;
  }
  if (needs.dbias) params.dtype == DType::kFloat64 ? merge_bias<double>(params, plan) : merge_bias<float>(params, plan);
  return {};
}

int64_t workspace_bytes(const LocalAttentionParams& params, Op op) {
  if (is_empty(params) || !needs_of(op, params).dbias) return 0;
  const Plan plan = plan_of(params, op);
  return plan.items * plan.table * static_cast<int64_t>(element_bytes(params));
}

bool is_half(const LocalAttentionParams& params) { return params.dtype == DType::kBFloat16 || params.dtype == DType::kFloat16; }

}  // namespace

int64_t local_attention_backward_workspace(const LocalAttentionParams& params) {
  return workspace_bytes(params, Op::kBackward);
}
int64_t local_bias_grad_workspace(const LocalAttentionParams& params) { return workspace_bytes(params, Op::kBiasGrad); }

bool local_attention_backward_is_wide(const LocalAttentionParams& params) {
  return is_half(params) && !is_empty(params) && plan_of(params, Op::kBackward).keys_shared();
}
bool local_av_transposed_is_wide(const LocalAttentionParams& params) {
  return is_half(params) && !is_empty(params) && plan_of(params, Op::kAvTransposed).keys_shared();
}

Status local_attention_forward(const LocalAttentionParams& params, ParallelFor parallel_for) {
  return run(params, Op::kForward, parallel_for);
}
Status local_attention_backward(const LocalAttentionParams& params, ParallelFor parallel_for) {
  return run(params, Op::kBackward, parallel_for);
}
Status local_qk(const LocalAttentionParams& params, ParallelFor parallel_for) { return run(params, Op::kQk, parallel_for); }
Status local_av(const LocalAttentionParams& params, ParallelFor parallel_for) { return run(params, Op::kAv, parallel_for); }
Status local_av_transposed(const LocalAttentionParams& params, ParallelFor parallel_for) {
  return run(params, Op::kAvTransposed, parallel_for);
}
Status local_bias_grad(const LocalAttentionParams& params, ParallelFor parallel_for) {
  return run(params, Op::kBiasGrad, parallel_for);
}

}  // namespace natrpb::cpu
