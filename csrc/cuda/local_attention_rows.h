// The plain kernels of local attention, which take every call: launchers of one storage type T (double, float, __half,
// __nv_bfloat16), instantiated in local_attention_rows_*.cu.
#pragma once

#include "natrpb/local_attention.h"

namespace natrpb::cuda {

// How the rows of an op that sums a bias gradient are dealt to warps, each with a table of its own. Depends on shapes alone.
// A block's rows belong to one head and are neighbors; its warps take turns.
struct TablePlan {
  int64_t entries = 0;  // of one head's bias table
  int64_t rows_per_block = 0;
  int64_t blocks_per_head = 0;
  int64_t tables_per_head = 0;  // one per warp
  int64_t offset = 0;           // bytes in params.workspace before the tables [h, tables_per_head, entries]
  bool in_shared = false;       // whether a block's tables grow in shared memory and reach the workspace once
};

template <class T>
struct LocalAttentionRows {
  static int64_t backward_workspace(const LocalAttentionParams& params);
  static int64_t bias_grad_workspace(const LocalAttentionParams& params);

  static Status forward(const LocalAttentionParams& params, void* stream);
  static Status backward(const LocalAttentionParams& params, void* stream);
  static Status qk(const LocalAttentionParams& params, void* stream);
  static Status av(const LocalAttentionParams& params, void* stream);
  static Status av_transposed(const LocalAttentionParams& params, void* stream);
  static Status bias_grad(const LocalAttentionParams& params, void* stream);
};

}  // namespace natrpb::cuda
