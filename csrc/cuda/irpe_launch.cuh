// Kernels around irpe_attention.cuh and rpe_index.cuh, and how they are launched.
//
//   attend        a block goes through tiles of one head; in the pass over queries it sums a bias table of its own
//   merge_tables  dtable[head][bucket] = sum of the blocks' tables, one warp per entry, in fp64 and in a fixed order
#pragma once

#include "cuda/irpe_attention.cuh"
#include "cuda/irpe_kernels.h"
#include "cuda/rpe_index.cuh"

namespace natrpb::cuda {

namespace irpe {

// Blocks whose registers fit a multiprocessor together, without spills: 168 registers per thread, 255 for fp64.
template <class Acc>
inline constexpr int kResidentBlocks = sizeof(Acc) == 8 ? 2 : 3;
inline constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
inline constexpr int64_t kMostSharedBytes = 99 << 10;  // what a block may have on every architecture from sm_80 on
// What one sort of the members' rows of buckets may take of them; nothing in fp64, where bins are few.
template <class T>
inline constexpr int64_t kMostLookupBytes = sizeof(T) == 8 ? 0 : 8 << 10;
inline constexpr int64_t kMostTableBytes = 16 << 20;  // all blocks' bias tables together: they stay in the second-level cache

template <class T, Pass kPass>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Compute<T>>)
    attend(const __grid_constant__ IrpeAttentionParams params, const __grid_constant__ AttentionPlan plan) {
  Attention<T, kPass>(params, plan).run();
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    merge_tables(const __grid_constant__ IrpeAttentionParams params, const __grid_constant__ AttentionPlan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;  // head * buckets + bucket
  const int64_t buckets = params.index_t.buckets;
  if (i >= params.heads * buckets) return;
  const int64_t head = i / buckets, bucket = i % buckets;
  const Acc* tables = reinterpret_cast<const Acc*>(static_cast<const char*>(params.workspace) + plan.tables);
  double sum = 0;
  for (int64_t block = lane_index(); block < plan.blocks_per_head; block += kWarp) {
    sum += tables[(head * plan.blocks_per_head + block) * buckets + bucket];
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) static_cast<Acc*>(params.dtable)[i] = static_cast<Acc>(sum);
}

// Whether rows of a matrix start at multiples of 16 bytes. Matrices that the op does not use are null.
template <class T>
bool is_aligned(const IrpeAttentionParams& params, const RowsView& matrix, int64_t rows) {
  const auto aligned = [](int64_t extent, int64_t stride) { return extent <= 1 || stride % kVector<T> == 0; };
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && aligned(params.batch, matrix.batch) &&
         aligned(params.heads, matrix.head) && aligned(rows, matrix.row);
}

template <class T, Pass kPass>
AttentionPlan plan_of(const IrpeAttentionParams& params) {
  using Acc = Compute<T>;
  using Kernel = Attention<T, kPass>;
  AttentionPlan plan;
  plan.tiles = ceil_div(Kernel::kOwnsQueries ? params.queries : params.keys, kTile);
  plan.vectors = params.head_dim % kVector<T> == 0 && params.value_dim % kVector<T> == 0 &&
                 is_aligned<T>(params, params.query, params.queries) && is_aligned<T>(params, params.key, params.keys) &&
                 is_aligned<T>(params, params.value, params.keys) && is_aligned<T>(params, params.dout, params.queries);
  const int64_t tables = kPass == Pass::kBackwardQuery ? params.index_t.buckets : 0;
  const int64_t buckets = Kernel::buckets(params);
  for (int i = 0; i < 2; ++i) {
    // Neighboring members' rows begin in neighboring banks.
    constexpr int64_t kWord = sizeof(T) < 4 ? 4 : sizeof(T);
    const int64_t words = ceil_div(Kernel::lookup_buckets(params, i) * sizeof(T), kWord);
    if (words > 0 && words * kWord * kWarp <= kMostLookupBytes<T>) {
      plan.lookup_pitch[i] = static_cast<int32_t>((words | 1) * kWord / sizeof(T));
    }
  }
  plan.bins = static_cast<int32_t>(min_of(buckets, (kMostSharedBytes - Kernel::shared_bytes(plan)) / Kernel::kBinBytes));
  int64_t channels = kPass == Pass::kForward ? params.value_dim : params.head_dim;
  if (kPass == Pass::kBackwardKey) channels = max_of(channels, params.value_dim);
  plan.sweeps = static_cast<int32_t>(max_of(max_of(ceil_div(channels, kSlice), 1), buckets ? ceil_div(buckets, plan.bins) : 0));
  int64_t most_blocks = kMostBlocks;
  if (tables > 0) most_blocks = kMostTableBytes / (max_of(tables, 1) * static_cast<int64_t>(sizeof(Acc)));
  plan.blocks_per_head = min_of(params.batch * plan.tiles, max_of(most_blocks / max_of(params.heads, 1), 1));
  constexpr int64_t kAlignment = 128;
  const int64_t deltas = params.batch * params.heads * params.queries * static_cast<int64_t>(sizeof(Acc));
  plan.tables = ceil_div(deltas, kAlignment) * kAlignment;
  return plan;
}

template <class T, Pass kPass>
Status launch_pass(const IrpeAttentionParams& params, void* stream) {
  const AttentionPlan plan = plan_of<T, kPass>(params);
  const dim3 grid(static_cast<unsigned>(params.heads * plan.blocks_per_head));
  return launch(attend<T, kPass>, grid, kThreads, Attention<T, kPass>::shared_bytes(plan), stream, params, plan);
}

}  // namespace irpe

template <class T>
Status IrpeKernels<T>::rpe_index(const RpeIndexParams& params, void* stream) {
  const int64_t warps = ceil_div(params.batch * params.heads, irpe::kPairsOfWarp) * params.queries;
  const int64_t blocks = min_of(ceil_div(warps, irpe::kSpreadThreads / kWarp), irpe::kMostBlocks);
  return launch(irpe::spread<T>, dim3(static_cast<unsigned>(blocks)), irpe::kSpreadThreads, 0, stream, params);
}

template <class T>
Status IrpeKernels<T>::rpe_index_transposed(const RpeIndexParams& params, void* stream) {
  using Acc = Compute<T>;
  const int64_t rows = params.batch * params.heads * params.queries;
  const int64_t blocks = min_of(ceil_div(rows, irpe::kGatherThreads), irpe::kMostBlocks);
  const auto most_bins = static_cast<int32_t>(min_of(params.index.buckets, irpe::kMostBins<Acc>));
  const int64_t shared = irpe::kGatherWarps * (most_bins + kWarp) * irpe::kTurned * static_cast<int64_t>(sizeof(Acc));
  return launch(irpe::gather<T>, dim3(static_cast<unsigned>(blocks)), irpe::kGatherThreads, shared, stream, params, most_bins);
}

template <class T>
int64_t IrpeKernels<T>::backward_workspace(const IrpeAttentionParams& params) {
  const irpe::AttentionPlan plan = irpe::plan_of<T, irpe::Pass::kBackwardQuery>(params);
  const int64_t entries = params.heads * plan.blocks_per_head * params.index_t.buckets;
  return plan.tables + entries * static_cast<int64_t>(sizeof(Compute<T>));
}

template <class T>
Status IrpeKernels<T>::forward(const IrpeAttentionParams& params, void* stream) {
  return irpe::launch_pass<T, irpe::Pass::kForward>(params, stream);
}

template <class T>
Status IrpeKernels<T>::backward(const IrpeAttentionParams& params, void* stream) {
  Status status = irpe::launch_pass<T, irpe::Pass::kBackwardQuery>(params, stream);
  if (!status.ok()) return status;
  if (params.index_t.buckets) {
    const auto plan = irpe::plan_of<T, irpe::Pass::kBackwardQuery>(params);
    const dim3 grid(static_cast<unsigned>(ceil_div(params.heads * params.index_t.buckets, irpe::kWarps)));
    status = launch(irpe::merge_tables<Compute<T>>, grid, irpe::kThreads, 0, stream, params, plan);
    if (!status.ok()) return status;
  }
  return irpe::launch_pass<T, irpe::Pass::kBackwardKey>(params, stream);
}

}  // namespace natrpb::cuda
