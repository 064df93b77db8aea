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

#include "cpu/local_attention_dots.inl"

#include "cpu/local_attention_scores.inl"

#include "cpu/local_attention_prefetch.inl"

#include "cpu/local_attention_items.inl"

#include "cpu/local_attention_unfused.inl"

#ifdef NATRPB_TILES
#include "cpu/amx.inl"
#endif
#include "cpu/local_attention_products.inl"

#include "cpu/local_attention_windows.inl"

// ---- entry points, see kernels.h ----

template <class S, class F = Compute<S>>
struct Workers {
  typedef Worker<S, F> general;
  typedef WindowWorker<S, F> windows;
};

inline bool by_windows(const LocalAttentionParams& params, Op op) {
  return (op == Op::kForward || op == Op::kBackward) && is_windowed(params);
}

template <class W>
int64_t scratch_bytes_of(const LocalAttentionParams& params, const Plan& plan, Op op) {
  if (by_windows(params, op)) {
    return static_cast<int64_t>(typename W::windows(params, plan, op == Op::kBackward, nullptr).bytes);
  }
  return static_cast<int64_t>(typename W::general(params, plan, op, nullptr).bytes);
}

template <class W>
void run_windows(const LocalAttentionParams& params, const Plan& plan, Op op, int64_t index, void* scratch) {
  typename W::windows worker(params, plan, op == Op::kBackward, scratch);
  if (!worker.begin(index)) return;
  op == Op::kForward ? worker.forward() : worker.backward();
}

#ifdef NATRPB_BF16_PRODUCTS

typedef Workers<BFloat16, Pair> Paired;

// Whether products are made of pairs of bf16; everything else is done as without the instructions.
bool is_paired(const LocalAttentionParams& params, Op op) {
  if (params.dtype != DType::kBFloat16 || params.head_dim % 2 != 0) return false;
  const bool even_values = params.value_dim % 2 == 0;
  if (by_windows(params, op)) return even_values;
#ifdef NATRPB_TILES
  return false;
#else
  return op == Op::kForward || (op == Op::kBackward && even_values);
#endif
}

int64_t scratch_bytes(const LocalAttentionParams& params, const Plan& plan, Op op) {
  const int64_t plain = avx512::kKernels.scratch_bytes(params, plan, op);
  return is_paired(params, op) ? max_of(plain, scratch_bytes_of<Paired>(params, plan, op)) : plain;
}

void run_item(const LocalAttentionParams& params, const Plan& plan, Op op, int64_t index, void* scratch) {
  if (!is_paired(params, op)) return avx512::kKernels.run_item(params, plan, op, index, scratch);
#ifdef NATRPB_TILES
  tile_configure();
  run_windows<Paired>(params, plan, op, index, scratch);
  tile_release();
#else
  if (by_windows(params, op)) return run_windows<Paired>(params, plan, op, index, scratch);
  Paired::general worker(params, plan, op, scratch);
  if (worker.begin(index)) return op == Op::kForward ? worker.forward() : worker.backward();
  avx512::kKernels.run_item(params, plan, op, index, scratch);
#endif
}

#else

template <class F>
auto with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(Workers<double>{});
    case DType::kBFloat16:
      return f(Workers<BFloat16>{});
    case DType::kFloat16:
      return f(Workers<Float16>{});
    default:
      return f(Workers<float>{});
  }
}

int64_t scratch_bytes(const LocalAttentionParams& params, const Plan& plan, Op op) {
  return with_storage(params.dtype, [&](auto workers) { return scratch_bytes_of<decltype(workers)>(params, plan, op); });
}

void run_item(const LocalAttentionParams& params, const Plan& plan, Op op, int64_t index, void* scratch) {
  with_storage(params.dtype, [&](auto workers) {
    if (by_windows(params, op)) return run_windows<decltype(workers)>(params, plan, op, index, scratch);
    typename decltype(workers)::general worker(params, plan, op, scratch);
    if (!worker.begin(index)) return;
    switch (op) {
      case Op::kForward:
        return worker.forward();
      case Op::kBackward:
        return worker.backward();
      case Op::kQk:
        return qk(worker);
      case Op::kAv:
        return av(worker);
      case Op::kAvTransposed:
        return av_transposed(worker);
      case Op::kBiasGrad:
        return bias_grad(worker);
    }
  });
}

#endif

extern const Kernels kKernels = {scratch_bytes, run_item};

}  // namespace natrpb::cpu::NATRPB_ISA

#include "cpu/isa_end.inl"
