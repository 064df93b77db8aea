// Kernels around the row functions of local_attention_rows*.cuh, and how they are launched.
//
//   each_row       one warp per row; a block's warps take turns at neighboring rows, whose boxes overlap: L1 serves them
//   rows_of_heads  the same for ops with a bias gradient: a block's rows belong to one head, a warp adds to a table of its own
//   merge_tables   drpb[head][entry] = sum of the warps' tables, one warp per entry, in fp64 and in a fixed order
//
// Bytes beside the rows' own: every warp of rows_of_heads writes its table once, merge_tables reads them.
#pragma once

#include "cuda/local_attention_rows.cuh"
#include "cuda/local_attention_rows.h"
#include "cuda/local_attention_rows_unfused.cuh"

namespace natrpb::cuda {

inline constexpr int kWarps = 4;  // of a block
inline constexpr int kThreads = kWarps * kWarp;
// Blocks whose registers fit a multiprocessor together, without spills: 168 registers per thread, 255 for fp64.
template <class Acc>
inline constexpr int kResidentBlocks = sizeof(Acc) == 8 ? 2 : 3;
inline constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

// Long runs of rows share more in L1; short ones come first where there would be too few blocks for a large GPU.
inline constexpr int64_t kRowsPerBlock = 32;
inline constexpr int64_t kBlocksWanted = 2048;

// Warps that have a table: enough to fill a large GPU twice, while the tables together stay in its second-level cache.
inline constexpr int64_t kMostTables = 4096;
inline constexpr int64_t kMostTableBytes = 16 << 20;
// A warp's table costs about as much as a few rows: fewer rows per warp would not pay.
inline constexpr int64_t kLeastRowsPerWarp = 8;
inline constexpr int64_t kMostSharedBytes = 48 << 10;  // what every block may have

// ---- row functions as types ----

template <class T, int V>
struct ForwardRow {
  using Acc = Compute<T>;
  static __device__ __forceinline__ void run(const LocalAttentionParams& params, const Row& row) {
    forward_row<T, V>(params, row);
  }
};
template <class T, int V>
struct BackwardQueryRow {
  using Acc = Compute<T>;
  static __device__ __forceinline__ void run(const LocalAttentionParams& params, const Row& row, Acc* table) {
    const int64_t index = (row.batch * params.heads + row.head) * positions_of(params) + flat_position(params, row.position);
    backward_query_row<T, V>(params, row, static_cast<Acc*>(params.workspace) + index, table);
  }
};
template <class T, int V>
struct BackwardKeyRow {
  using Acc = Compute<T>;
  static __device__ __forceinline__ void run(const LocalAttentionParams& params, const Row& row) {
    backward_key_row<T, V>(params, row, static_cast<const Acc*>(params.workspace), 1);
  }
};
template <class T, int V>
struct QkRow {
  using Acc = Compute<T>;
  static __device__ __forceinline__ void run(const LocalAttentionParams& params, const Row& row) { qk_row<T, V>(params, row); }
};
template <class T, int V>
struct AvRow {
  using Acc = Compute<T>;
  static __device__ __forceinline__ void run(const LocalAttentionParams& params, const Row& row) { av_row<T, V>(params, row); }
};
template <class T, int V>
struct AvTransposedRow {
  using Acc = Compute<T>;
  static __device__ __forceinline__ void run(const LocalAttentionParams& params, const Row& row) {
    av_transposed_row<T, V>(params, row);
  }
};
template <class T>
struct BiasGradRow {
  using Acc = Compute<T>;
  static __device__ __forceinline__ void run(const LocalAttentionParams& params, const Row& row, Acc* table) {
    bias_grad_row<T>(params, row, table);
  }
};

// ---- kernels ----

template <class RowFunction>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<typename RowFunction::Acc>)
    each_row(const __grid_constant__ LocalAttentionParams params, const int64_t rows_per_block) {
  const int64_t positions = positions_of(params), rows = params.batch * params.heads * positions;
  const int64_t begin = blockIdx.x * rows_per_block, end = min_of(begin + rows_per_block, rows);
  for (int64_t i = begin + threadIdx.x / kWarp; i < end; i += kWarps) {
    const int64_t batch_and_head = i / positions;
    RowFunction::run(params, row_at(params, batch_and_head / params.heads, batch_and_head % params.heads, i % positions));
  }
}

template <class RowFunction>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<typename RowFunction::Acc>)
    rows_of_heads(const __grid_constant__ LocalAttentionParams params, const __grid_constant__ TablePlan plan) {
  using Acc = typename RowFunction::Acc;
  const int64_t positions = positions_of(params), rows = params.batch * positions;
  const int64_t head = blockIdx.x / plan.blocks_per_head, block = blockIdx.x % plan.blocks_per_head;
  const int warp = threadIdx.x / kWarp;
  Acc *result = nullptr, *table = nullptr;
  if (params.drpb) {
    result = reinterpret_cast<Acc*>(static_cast<char*>(params.workspace) + plan.offset);
    result += (head * plan.tables_per_head + block * kWarps + warp) * plan.entries;
    table = plan.in_shared ? shared_memory<Acc>() + warp * plan.entries : result;
    for (int64_t i = lane_index(); i < plan.entries; i += kWarp) table[i] = 0;
    __syncwarp();
  }
  const int64_t begin = block * plan.rows_per_block, end = min_of(begin + plan.rows_per_block, rows);
  for (int64_t i = begin + warp; i < end; i += kWarps) {
    RowFunction::run(params, row_at(params, i / positions, head, i % positions), table);
    __syncwarp();
  }
  if (table != result) {
    for (int64_t i = lane_index(); i < plan.entries; i += kWarp) result[i] = table[i];
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    merge_tables(const __grid_constant__ LocalAttentionParams params, const __grid_constant__ TablePlan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;  // head * entries + entry
  if (i >= params.heads * plan.entries) return;
  const int64_t head = i / plan.entries, entry = i % plan.entries;
  const Acc* tables = reinterpret_cast<const Acc*>(static_cast<const char*>(params.workspace) + plan.offset);
  double sum = 0;
  for (int64_t t = lane_index(); t < plan.tables_per_head; t += kWarp) {
    sum += tables[(head * plan.tables_per_head + t) * plan.entries + entry];
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) static_cast<Acc*>(params.drpb)[i] = static_cast<Acc>(sum);
}

// ---- launchers ----

template <class Acc>
TablePlan plan_tables(const LocalAttentionParams& params, int64_t offset) {
  TablePlan plan;
  plan.entries = table_entries(params);
  plan.offset = offset;
  const int64_t rows = params.batch * positions_of(params), bytes = plan.entries * static_cast<int64_t>(sizeof(Acc));
  const int64_t most_tables = max_of(min_of(kMostTables, kMostTableBytes / bytes) / max_of(params.heads, 1), 1);
  const int64_t blocks = max_of(min_of(most_tables / kWarps, ceil_div(rows, kWarps * kLeastRowsPerWarp)), 1);
  plan.rows_per_block = ceil_div(rows, blocks);
  plan.blocks_per_head = rows > 0 ? ceil_div(rows, plan.rows_per_block) : 0;
  plan.tables_per_head = plan.blocks_per_head * kWarps;
  plan.in_shared = bytes * kWarps <= kMostSharedBytes;
  return plan;
}

// Bytes of the deltas [B, h, *] at the start of the backward's workspace.
template <class Acc>
int64_t delta_bytes(const LocalAttentionParams& params) {
  constexpr int64_t kAlignment = 128;
  const int64_t bytes = params.batch * params.heads * positions_of(params) * static_cast<int64_t>(sizeof(Acc));
  return ceil_div(bytes, kAlignment) * kAlignment;
}
template <class Acc>
int64_t table_bytes(const LocalAttentionParams& params, const TablePlan& plan) {
  return params.heads * plan.tables_per_head * plan.entries * static_cast<int64_t>(sizeof(Acc));
}

// Whether every row of a tensor starts at a multiple of 16 bytes. Tensors that the op does not use are null.
template <class T>
bool is_aligned(const LocalAttentionParams& params, const View& view) {
  const auto aligned = [](int64_t extent, int64_t stride) { return extent <= 1 || stride % kVector<T> == 0; };
  bool all = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  all = all && aligned(params.batch, view.batch) && aligned(params.heads, view.head);
  for (int a = 0; a < kAxes; ++a) all = all && aligned(params.axis[a].length, view.space[a]);
  return all;
}
template <class T>
bool can_load_vectors(const LocalAttentionParams& params) {
  bool all = params.head_dim % kVector<T> == 0 && params.value_dim % kVector<T> == 0;
  for (const View* view :
       {&params.query, &params.key, &params.value, &params.out, &params.dout, &params.dquery, &params.dkey, &params.dvalue}) {
    all = all && is_aligned<T>(params, *view);
  }
  return all;
}

inline Status launch_each_row(void (*kernel)(LocalAttentionParams, int64_t), const LocalAttentionParams& params, void* stream) {
  const int64_t rows = params.batch * params.heads * positions_of(params);
  const int64_t rows_per_block =
      max_of(min_of(kRowsPerBlock, max_of(rows / kBlocksWanted, kWarps)), ceil_div(rows, kMostBlocks));
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, rows_per_block)));
  return launch(kernel, grid, kThreads, 0, stream, params, rows_per_block);
}
// `Rows<T, V>` for every row, with the widest loads that the tensors allow.
template <template <class, int> class Rows, class T>
Status launch_rows(const LocalAttentionParams& params, void* stream) {
  return launch_each_row(can_load_vectors<T>(params) ? each_row<Rows<T, kVector<T>>> : each_row<Rows<T, 1>>, params, stream);
}

template <class Acc>
Status launch_rows_of_heads(void (*kernel)(LocalAttentionParams, TablePlan), const LocalAttentionParams& params,
                            const TablePlan& plan, void* stream) {
  const int64_t blocks = params.heads * plan.blocks_per_head;
  const int64_t shared = params.drpb && plan.in_shared ? kWarps * plan.entries * static_cast<int64_t>(sizeof(Acc)) : 0;
  const Status status = launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, shared, stream, params, plan);
  if (!status.ok() || !params.drpb) return status;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.heads * plan.entries, kWarps)));
  return launch(merge_tables<Acc>, grid, kThreads, 0, stream, params, plan);
}

template <class T>
int64_t LocalAttentionRows<T>::backward_workspace(const LocalAttentionParams& params) {
  using Acc = Compute<T>;
  const int64_t deltas = delta_bytes<Acc>(params);
  return params.drpb ? deltas + table_bytes<Acc>(params, plan_tables<Acc>(params, deltas)) : deltas;
}
template <class T>
int64_t LocalAttentionRows<T>::bias_grad_workspace(const LocalAttentionParams& params) {
  return table_bytes<Compute<T>>(params, plan_tables<Compute<T>>(params, 0));
}

template <class T>
Status LocalAttentionRows<T>::forward(const LocalAttentionParams& params, void* stream) {
  return launch_rows<ForwardRow, T>(params, stream);
}
template <class T>
Status LocalAttentionRows<T>::backward(const LocalAttentionParams& params, void* stream) {
  using Acc = Compute<T>;
  const TablePlan plan = plan_tables<Acc>(params, delta_bytes<Acc>(params));
  const auto query_kernel =
      can_load_vectors<T>(params) ? rows_of_heads<BackwardQueryRow<T, kVector<T>>> : rows_of_heads<BackwardQueryRow<T, 1>>;
  const Status status = launch_rows_of_heads<Acc>(query_kernel, params, plan, stream);
  return status.ok() ? launch_rows<BackwardKeyRow, T>(params, stream) : status;
}
template <class T>
Status LocalAttentionRows<T>::qk(const LocalAttentionParams& params, void* stream) {
  return launch_rows<QkRow, T>(params, stream);
}
template <class T>
Status LocalAttentionRows<T>::av(const LocalAttentionParams& params, void* stream) {
  return launch_rows<AvRow, T>(params, stream);
}
template <class T>
Status LocalAttentionRows<T>::av_transposed(const LocalAttentionParams& params, void* stream) {
  return launch_rows<AvTransposedRow, T>(params, stream);
}
template <class T>
Status LocalAttentionRows<T>::bias_grad(const LocalAttentionParams& params, void* stream) {
  return launch_rows_of_heads<Compute<T>>(rows_of_heads<BiasGradRow<T>>, params, plan_tables<Compute<T>>(params, 0), stream);
}

}  // namespace natrpb::cuda
