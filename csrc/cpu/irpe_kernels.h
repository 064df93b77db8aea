// The irpe kernels of one instruction set, and how their work is cut. Every set is the same source (irpe_*.inl) compiled for
// another target; irpe.cpp chooses one at run time.
#pragma once

#include <cstdint>

#include "natrpb/irpe.h"

namespace natrpb::cpu {

// An item is a block of queries of one (batch, head), with all keys; a function of shapes alone, never of threads.
struct IrpePlan {
  int64_t blocks;      // of queries, per (batch, head)
  int64_t block_size;  // queries per block, the last one may hold fewer
  int64_t items;
  // Elements of the workspace, per item: sums over the item's queries that other items add to, in the compute type.
  int64_t dkey, dvalue, dkey_rows;  // 0 where a block holds all queries
  int64_t dtable;

  int64_t partial() const { return dkey + dvalue + dkey_rows + dtable; }
};

IrpePlan make_irpe_plan(const IrpeAttentionParams& params);

enum class IrpeOp { kForward, kBackward };

struct IrpeKernels {
  // Bytes of scratch that one thread needs.
  int64_t (*attention_scratch)(const IrpeAttentionParams&, const IrpePlan&, IrpeOp);
  void (*attention_item)(const IrpeAttentionParams&, const IrpePlan&, IrpeOp, int64_t item, void* scratch);
  // Adds the parts of one (batch, head) in the order of its blocks; nothing to do where a block holds all queries.
  void (*attention_merge)(const IrpeAttentionParams&, const IrpePlan&, int64_t pair);

  // rpe_index, or its transpose: how many items, bytes of scratch that one thread needs, and one of the items.
  int64_t (*index_items)(const RpeIndexParams&, bool transposed);
  int64_t (*index_scratch)(const RpeIndexParams&, bool transposed);
  void (*index_item)(const RpeIndexParams&, bool transposed, int64_t item, void* scratch);
};

namespace portable {
extern const IrpeKernels kIrpeKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const IrpeKernels kIrpeKernels;
}
namespace avx512 {
extern const IrpeKernels kIrpeKernels;
}
#endif

}  // namespace natrpb::cpu
