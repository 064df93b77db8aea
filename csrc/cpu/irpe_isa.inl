// The irpe kernels of one instruction set; see local_attention_isa.inl for how these files are made.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/irpe_kernels.h"
#include "cpu/plan.h"

#include "cpu/isa_begin.inl"

namespace natrpb::cpu::NATRPB_ISA {

inline constexpr int kVectorBytes = NATRPB_VECTOR_BYTES;

#include "cpu/simd.inl"

#include "cpu/local_attention_copies.inl"

namespace irpe {

#include "cpu/irpe_products.inl"

#include "cpu/irpe_buckets.inl"

#include "cpu/irpe_attention.inl"

#include "cpu/rpe_index.inl"

// ---- entry points, see irpe_kernels.h ----

template <class S>
struct Storage {
  typedef S type;
};
template <class F>
auto with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(Storage<double>{});
    case DType::kBFloat16:
      return f(Storage<BFloat16>{});
    case DType::kFloat16:
      return f(Storage<Float16>{});
    default:
      return f(Storage<float>{});
  }
}

int64_t attention_scratch(const IrpeAttentionParams& params, const IrpePlan& plan, IrpeOp op) {
  return with_storage(params.dtype, [&](auto storage) {
    const IrpeAttention<typename decltype(storage)::type> worker(params, plan, op, 0, nullptr);
    return static_cast<int64_t>(worker.bytes);
  });
}

void attention_item(const IrpeAttentionParams& params, const IrpePlan& plan, IrpeOp op, int64_t item, void* scratch) {
  with_storage(params.dtype, [&](auto storage) {
    const IrpeAttention<typename decltype(storage)::type> worker(params, plan, op, item, scratch);
    op == IrpeOp::kForward ? worker.forward() : worker.backward();
  });
}

void attention_merge(const IrpeAttentionParams& params, const IrpePlan& plan, int64_t pair) {
  with_storage(params.dtype, [&](auto storage) {
    typedef typename decltype(storage)::type S;
    const int64_t batch = pair / params.heads, head = pair % params.heads, step = plan.partial();
    const Compute<S>* part = static_cast<const Compute<S>*>(params.workspace) + pair * plan.blocks * step;
    const auto merge = [&](const RowsView& m, int64_t size, int64_t columns) {
      if (size) merge_parts<S>(m, batch, head, params.keys, columns, part, step, plan.blocks);
      part += size;
    };
    merge(params.dkey, plan.dkey, params.head_dim);
    merge(params.dvalue, plan.dvalue, params.value_dim);
    merge(params.dkey_rows, plan.dkey_rows, params.index_q.buckets);
  });
}

int64_t index_items(const RpeIndexParams& params, bool transposed) {
  return with_storage(params.dtype,
                      [&](auto storage) { return RpeIndex<typename decltype(storage)::type>{params}.items(transposed); });
}

int64_t index_scratch(const RpeIndexParams& params, bool transposed) {
  return with_storage(params.dtype,
                      [&](auto storage) { return RpeIndex<typename decltype(storage)::type>{params}.scratch(transposed); });
}

void index_item(const RpeIndexParams& params, bool transposed, int64_t item, void* scratch) {
  with_storage(params.dtype, [&](auto storage) {
    typedef typename decltype(storage)::type S;
    const RpeIndex<S> worker{params};
    Compute<S>* memory = static_cast<Compute<S>*>(scratch);
    transposed ? worker.transposed(item, memory) : worker.forward(item, memory);
  });
}

}  // namespace irpe

extern const IrpeKernels kIrpeKernels = {irpe::attention_scratch, irpe::attention_item, irpe::attention_merge,
                                         irpe::index_items,       irpe::index_scratch,  irpe::index_item};

}  // namespace natrpb::cpu::NATRPB_ISA

#include "cpu/isa_end.inl"
