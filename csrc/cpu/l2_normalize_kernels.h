// The l2_normalize kernels of one instruction set: the same source (l2_normalize_isa.inl) compiled for several targets;
// l2_normalize.cpp chooses one at run time.
#pragma once

#include <cstdint>

#include "natrpb/l2_normalize.h"

namespace natrpb::cpu {

// Rows of one batch entry that an item takes, in all heads. Fixed, so that sums depend on the shapes alone.
inline constexpr int64_t kL2ItemRows = 64;

inline int64_t l2_items_per_batch(const L2NormalizeParams& params) { return ceil_div(params.rows, kL2ItemRows); }

struct L2NormalizeKernels {
  void (*forward_item)(const L2NormalizeParams&, int64_t item);
  // Leaves the item's part of dfactor, [h] in the compute type, in row `item` of the workspace.
  void (*backward_item)(const L2NormalizeParams&, int64_t item);
};

namespace portable {
extern const L2NormalizeKernels kL2NormalizeKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const L2NormalizeKernels kL2NormalizeKernels;
}
namespace avx512 {
extern const L2NormalizeKernels kL2NormalizeKernels;
}
#endif

}  // namespace natrpb::cpu
