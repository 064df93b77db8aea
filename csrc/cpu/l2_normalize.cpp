// Launchers of the l2_normalize kernels: cut the rows into items, run them on the caller's threads, add the items' parts of
// dfactor in the order of the items.

#include "natrpb/l2_normalize.h"

#include "cpu/isa.h"
#include "cpu/l2_normalize_kernels.h"
#include "cpu/parallel.h"

namespace natrpb::cpu {

namespace {

const L2NormalizeKernels& kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512) return avx512::kL2NormalizeKernels;
  if (active_isa() == Isa::kAvx2) return avx2::kL2NormalizeKernels;
#endif
  return portable::kL2NormalizeKernels;
}

int64_t items_of(const L2NormalizeParams& params) { return params.batch * l2_items_per_batch(params); }

void run(const L2NormalizeParams& params, ParallelFor parallel_for, void (*run_item)(const L2NormalizeParams&, int64_t)) {
  const int64_t items = items_of(params);
  if (items == 0) return;
  run_items(parallel_for, items, 0, [&](int64_t item, void*) { run_item(params, item); });
}

template <class T>
void merge_dfactor(const L2NormalizeParams& params) {
  const T* parts = static_cast<const T*>(params.workspace);
  for (int64_t head = 0; head < params.heads; ++head) {
    double sum = 0;
    for (int64_t item = 0; item < items_of(params); ++item) sum += parts[item * params.heads + head];
    static_cast<T*>(params.dfactor)[head] = static_cast<T>(sum);
  }
}

}  // namespace

int64_t l2_normalize_backward_workspace(const L2NormalizeParams& params) {
  const size_t element = params.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return params.factor ? items_of(params) * params.heads * static_cast<int64_t>(element) : 0;
}

Status l2_normalize(const L2NormalizeParams& params, ParallelFor parallel_for) {
  run(params, parallel_for, kernels().forward_item);
  return {};
}

Status l2_normalize_backward(const L2NormalizeParams& params, ParallelFor parallel_for) {
  run(params, parallel_for, kernels().backward_item);
  if (params.dfactor) params.dtype == DType::kFloat64 ? merge_dfactor<double>(params) : merge_dfactor<float>(params);
  return {};
}

}  // namespace natrpb::cpu
