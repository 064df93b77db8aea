// Included by the tiny file of each instruction set after it has defined NATRPB_ISA, NATRPB_VECTOR_BYTES and NATRPB_TARGET.
// NB: everything below the pragma is compiled for that target, and nothing there may be shared with other files: an inline
// function of the standard library instantiated here could be the copy that the linker keeps for a machine without the set.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

#include "cpu/isa_begin.inl"

namespace natrpb::cpu::NATRPB_ISA {

inline constexpr int kVectorBytes = NATRPB_VECTOR_BYTES;

#include "cpu/simd.inl"

#include "cpu/local_attention_copies.inl"

#include "cpu/local_attention_blocks.inl"

#include "cpu/local_attention_tiles.inl"

#include "cpu/local_attention_scores.inl"

#include "cpu/local_attention_prefetch.inl"

#include "cpu/local_attention_items.inl"

// ---- entry points, see kernels.h ----

#ifdef NATRPB_BF16_PRODUCTS

// Whether products are made of pairs of bf16; everything else is done as without the instruction.
bool is_paired(const LocalAttentionParams& params, Op op) {
  if (params.dtype != DType::kBFloat16 || params.head_dim % 2 != 0) return false;
  return op == Op::kForward || (op == Op::kBackward && params.value_dim % 2 == 0);
}

int64_t scratch_bytes(const LocalAttentionParams& params, const Plan& plan, Op op) {
  const int64_t plain = avx512::kKernels.scratch_bytes(params, plan, op);
  if (!is_paired(params, op)) return plain;
  const Worker<BFloat16, Pair> worker(params, plan, needs_of(op, params), nullptr);
  return max_of(plain, static_cast<int64_t>(worker.bytes));
}

void run_item(const LocalAttentionParams& params, const Plan& plan, Op op, int64_t index, void* scratch) {
  if (is_paired(params, op)) {
    Worker<BFloat16, Pair> worker(params, plan, needs_of(op, params), scratch);
    if (worker.begin(index)) return op == Op::kForward ? worker.forward() : worker.backward();
  }
  avx512::kKernels.run_item(params, plan, op, index, scratch);
}

#else

template <class F>
auto with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}
template <class Pointer>
struct StorageOf;
template <class S>
struct StorageOf<S*> {
  typedef Worker<S> worker;
};

int64_t scratch_bytes(const LocalAttentionParams& params, const Plan& plan, Op op) {
  return with_storage(params.dtype, [&](auto storage) {
    typename StorageOf<decltype(storage)>::worker worker(params, plan, needs_of(op, params), nullptr);
    return static_cast<int64_t>(worker.bytes);
  });
}

void run_item(const LocalAttentionParams& params, const Plan& plan, Op op, int64_t index, void* scratch) {
  with_storage(params.dtype, [&](auto storage) {
    typename StorageOf<decltype(storage)>::worker worker(params, plan, needs_of(op, params), scratch);
    if (!worker.begin(index)) return;
    switch (op) {
      case Op::kForward:
        return worker.forward();
      case Op::kBackward:
        return worker.backward();
      case Op::kQk:
        return worker.qk();
      case Op::kAv:
        return worker.av();
      case Op::kAvTransposed:
        return worker.av_transposed();
      case Op::kBiasGrad:
        return worker.bias_grad();
    }
  });
}

#endif

extern const Kernels kKernels = {scratch_bytes, run_item};

}  // namespace natrpb::cpu::NATRPB_ISA

#include "cpu/isa_end.inl"
