// Launchers of the irpe kernels: cut the work into items, run them on the caller's threads, form the sums that cross items in a
// fixed order.

#include "natrpb/irpe.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/irpe_kernels.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace natrpb::cpu {

namespace {

// Enough items to keep a few cores busy evenly.
constexpr int64_t kItemsWanted = 16;
// Fewer queries than this per item would not pay for staging the keys.
constexpr int64_t kLeastQueries = 48;

const IrpeKernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512) return avx512::kIrpeKernels;
  if (active_isa() == Isa::kAvx2) return avx2::kIrpeKernels;
#endif
  return portable::kIrpeKernels;
}

size_t element_bytes(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

Status run_index(const RpeIndexParams& params, bool transposed, ParallelFor parallel_for) {
  const int64_t columns = transposed ? params.index.buckets : params.keys;
  if (params.batch * params.heads * params.queries * columns == 0) return {};
  return run_items(parallel_for, kernels().index_items(params, transposed), kernels().index_scratch(params, transposed),
                   [&](int64_t item, void* scratch) { kernels().index_item(params, transposed, item, scratch); });
}

Status run_attention(const IrpeAttentionParams& params, const IrpePlan& plan, IrpeOp op, ParallelFor parallel_for) {
  if (plan.items == 0) return {};
  return run_items(parallel_for, plan.items, kernels().attention_scratch(params, plan, op),
                   [&](int64_t item, void* scratch) { kernels().attention_item(params, plan, op, item, scratch); });
}

// dtable[head][bucket] = sum of the items' parts in the order of the items.
template <class T>
void merge_table(const IrpeAttentionParams& params, const IrpePlan& plan) {
  const int64_t buckets = params.index_t.buckets;
  std::vector<double> sum(buckets);
  for (int64_t head = 0; head < params.heads; ++head) {
    sum.assign(buckets, 0.0);
    for (int64_t batch = 0; batch < params.batch; ++batch) {
      for (int64_t block = 0; block < plan.blocks; ++block) {
        const int64_t item = (batch * params.heads + head) * plan.blocks + block;
        const T* part = static_cast<const T*>(params.workspace) + (item + 1) * plan.partial() - plan.dtable;
        for (int64_t c = 0; c < buckets; ++c) sum[c] += part[c];
      }
    }
    T* to = static_cast<T*>(params.dtable) + head * buckets;
    for (int64_t c = 0; c < buckets; ++c) to[c] = static_cast<T>(sum[c]);
  }
}

}  // namespace

IrpePlan make_irpe_plan(const IrpeAttentionParams& params) {
  IrpePlan plan{};
  const int64_t pairs = params.batch * params.heads;
  const int64_t most = std::max<int64_t>(1, params.queries / kLeastQueries);
  plan.block_size = ceil_div(params.queries, pairs ? min_of(most, ceil_div(kItemsWanted, pairs)) : 1);
  plan.blocks = plan.block_size ? ceil_div(params.queries, plan.block_size) : 1;
  plan.items = pairs * plan.blocks;
  if (plan.blocks > 1) {
    plan.dkey = params.keys * params.head_dim;
    plan.dvalue = params.keys * params.value_dim;
    plan.dkey_rows = params.keys * params.index_q.buckets;
  }
  plan.dtable = params.index_t.buckets;
  return plan;
}

Status rpe_index(const RpeIndexParams& params, ParallelFor parallel_for) { return run_index(params, false, parallel_for); }
Status rpe_index_transposed(const RpeIndexParams& params, ParallelFor parallel_for) {
  return run_index(params, true, parallel_for);
}

int64_t irpe_attention_backward_workspace(const IrpeAttentionParams& params) {
  const IrpePlan plan = make_irpe_plan(params);
  return plan.items * plan.partial() * static_cast<int64_t>(element_bytes(params.dtype));
}

Status irpe_attention_forward(const IrpeAttentionParams& params, ParallelFor parallel_for) {
  return run_attention(params, make_irpe_plan(params), IrpeOp::kForward, parallel_for);
}

Status irpe_attention_backward(const IrpeAttentionParams& params, ParallelFor parallel_for) {
  const IrpePlan plan = make_irpe_plan(params);
  const Status status = run_attention(params, plan, IrpeOp::kBackward, parallel_for);
  if (!status.ok()) return status;
  if (plan.dkey + plan.dvalue + plan.dkey_rows) {
    run_items(parallel_for, params.batch * params.heads, 0,
              [&](int64_t pair, void*) { kernels().attention_merge(params, plan, pair); });
  }
  if (params.dtable) params.dtype == DType::kFloat64 ? merge_table<double>(params, plan) : merge_table<float>(params, plan);
  return {};
}

}  // namespace natrpb::cpu
