// The kernels of one instruction set, and what each op asks of them. Every set is the same source (local_attention_*.inl)
// compiled for another target; local_attention.cpp chooses one at run time.
#pragma once

#include <cstdint>

#include "cpu/plan.h"
#include "natrpb/local_attention.h"

namespace natrpb::cpu {

enum class Op { kForward, kBackward, kQk, kAv, kAvTransposed, kBiasGrad };

// What an item stages (copies of its keys in the compute type) and accumulates.
struct Needs {
  bool dots;                   // query . key and dout . value of natural rows, where slots are few
  bool scores, dscores;        // else: transposed keys for query . key; transposed values for dout . value
  bool key_rows, value_rows;   // natural rows, for weighted sums and dots
  bool query_tile, dout_tile;  // natural rows of a block's queries, for scatters
  bool dkey, dvalue, dbias;    // sums over the item's queries
  bool bias;
};

// Whether every query sees all slots, and so few that dots of natural rows are faster (docs/design/cpu.md).
inline bool has_few_slots(const LocalAttentionParams& params) {
  constexpr int64_t kFewSlots = 16;
  int64_t slots = 1;
  for (const Axis& axis : params.axis) {
    if (axis.kind != AxisKind::kNeighborhood || axis.kernel_size > kFewSlots) return false;
    slots *= axis.kernel_size;
  }
  return slots <= kFewSlots;
}

// `rows_in_place`: whether natural rows need no copy. The plan is made as if they did.
inline Needs needs_of(Op op, const LocalAttentionParams& params, bool rows_in_place = false) {
  Needs needs{};
  const bool with_scores = op == Op::kForward || op == Op::kBackward || op == Op::kQk;
  needs.bias = with_scores && params.rpb;
  needs.value_rows = op == Op::kForward || op == Op::kAv;
  needs.dots = rows_in_place && with_scores && has_few_slots(params);
  needs.scores = with_scores && !needs.dots;
  needs.key_rows = needs.dots;
  if (op == Op::kBackward) {
    needs.dscores = !needs.dots;
    needs.value_rows = needs.dots;
    needs.key_rows = needs.query_tile = needs.dout_tile = needs.dkey = needs.dvalue = true;
    needs.dbias = params.drpb != nullptr;
  }
  if (op == Op::kAvTransposed) needs.dout_tile = needs.dvalue = true;
  if (op == Op::kBiasGrad) needs.dbias = true;
  return needs;
}

struct Kernels {
  // Bytes of scratch that one thread needs.
  int64_t (*scratch_bytes)(const LocalAttentionParams&, const Plan&, Op);
  void (*run_item)(const LocalAttentionParams&, const Plan&, Op, int64_t item, void* scratch);
};

namespace portable {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
namespace amx {
extern const Kernels kKernels;
}
#endif

}  // namespace natrpb::cpu
