// rpe_index and its transpose, for one map shared by all (batch, head) pairs.
//
//   spread   y[b,h,i,j] = x[b,h,i, index[i,j]]: one warp per query and kPairsOfWarp pairs, lanes are keys. It loads a key's bucket
//            once for all its pairs; a row of x is looked up in L1, y is written in order.
//   gather   x[b,h,i,c] = sum of y[b,h,i,j] over the j with index[i,j] = c: lanes are rows, pairs first, so that lanes mostly
//            share a query. A tile of y, 32 rows by 32 keys, is turned in shared memory; then every lane adds its row's entries, in
//            the order of j, to bins of its own. More buckets than bins fit take several sweeps over y.
//
// Bytes: y once (or once per sweep) and x once. A lane's bins lie in a bank of their own where lanes share a query.
#pragma once

#include "cuda/rows.cuh"
#include "natrpb/irpe.h"

namespace natrpb::cuda::irpe {

inline constexpr int kPairsOfWarp = 8;
inline constexpr int kSpreadThreads = 4 * kWarp;
inline constexpr int kSpreadBlocks = 5;  // that share a multiprocessor

// Elements of the rows of one query, of the (batch, head) pairs.
template <class T>
__device__ __forceinline__ T* row_of(const RowsView& matrix, int64_t pair, int64_t heads, int64_t row) {
  return static_cast<T*>(matrix.data) + matrix.offset(pair / heads, pair % heads, row);
}
template <class T>
__device__ __forceinline__ T not_a_number() {
  T nan;
  round_to(kNaN<Compute<T>>, nan);
  return nan;
}

template <class T>
__global__ void __launch_bounds__(kSpreadThreads, kSpreadBlocks) spread(const __grid_constant__ RpeIndexParams params) {
  const int64_t pairs = params.batch * params.heads, groups = ceil_div(pairs, kPairsOfWarp);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kSpreadThreads / kWarp);
  int64_t warp = static_cast<int64_t>(blockIdx.x) * (kSpreadThreads / kWarp) + threadIdx.x / kWarp;
  for (; warp < groups * params.queries; warp += warps) {
    const int64_t query = warp % params.queries, first = warp / params.queries * kPairsOfWarp;
    const T* x[kPairsOfWarp];
    T* y[kPairsOfWarp];
#pragma unroll
    for (int p = 0; p < kPairsOfWarp; ++p) {
      const int64_t pair = min_of(first + p, pairs - 1);
      x[p] = row_of<const T>(params.x, pair, params.heads, query);
      y[p] = row_of<T>(params.y, pair, params.heads, query);
    }
    const int count = static_cast<int>(min_of(kPairsOfWarp, pairs - first));
    const int32_t* index = params.index.data + query * params.keys;
    for (int64_t j = lane_index(); j < params.keys; j += kWarp) {
      const uint32_t bucket = static_cast<uint32_t>(index[j]);
      const bool known = bucket < params.index.buckets;
      T found[kPairsOfWarp];
#pragma unroll
      for (int p = 0; p < kPairsOfWarp; ++p) {
        if (p < count) found[p] = known ? x[p][bucket] : not_a_number<T>();
      }
#pragma unroll
      for (int p = 0; p < kPairsOfWarp; ++p) {
        if (p < count) y[p][j] = found[p];
      }
    }
  }
}

inline constexpr int kGatherWarps = 2;
inline constexpr int kGatherThreads = kGatherWarps * kWarp;
inline constexpr int kGatherBlocks = 8;    // that share a multiprocessor at some 60 buckets
inline constexpr int kTurned = kWarp + 1;  // pitch of what is written by rows and read by columns, or the other way round
inline constexpr int kGatherAtOnce = 8;    // entries of the map whose loads are under way together
// Bins of a lane: what two warps of tiles and bins take must fit the smallest shared memory, 99 KiB on sm_86, 89 and 120.
template <class Acc>
inline constexpr int kMostBins = 1024 / sizeof(Acc);
static_assert(kGatherWarps * (kMostBins<float> + kWarp) * kTurned * sizeof(float) <= 99 << 10);
static_assert(kGatherWarps * (kMostBins<double> + kWarp) * kTurned * sizeof(double) <= 99 << 10);

// tile[key][lane] = y of every lane's row, keys first .. first + kWarp - 1; lanes without a row stand at another's
template <class T>
__device__ __forceinline__ void turn(const T* row, int64_t first, int64_t keys, Compute<T>* tile) {
  const int64_t j = first + lane_index();
  const uint64_t address = reinterpret_cast<uint64_t>(row);
#pragma unroll 8
  for (int r = 0; r < kWarp; ++r) {
    const T* of_r = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, r));
    if (j < keys) tile[lane_index() * kTurned + r] = widen(of_r[j]);
  }
}

template <class T>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    gather(const __grid_constant__ RpeIndexParams params, const int32_t most_bins) {
  using Acc = Compute<T>;
  Acc* tile = shared_memory<Acc>() + threadIdx.x / kWarp * (kWarp + most_bins) * kTurned;  // [key][kTurned]
  Acc* bins = tile + kWarp * kTurned;                                                      // [bucket][kTurned]
  const int lane = lane_index();
  const int64_t pairs = params.batch * params.heads, rows = pairs * params.queries;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kGatherThreads;
  // row = query * pairs + pair
  for (int64_t base = (static_cast<int64_t>(blockIdx.x) * kGatherWarps + threadIdx.x / kWarp) * kWarp; base < rows;
       base += step) {
    const int64_t row = min_of(base + lane, rows - 1), query = row / pairs;
    const T* y = row_of<const T>(params.y, row % pairs, params.heads, query);
    T* x = row_of<T>(params.x, row % pairs, params.heads, query);
    const int32_t* index = params.index.data + query * params.keys;
    for (int64_t first = 0; first < params.index.buckets; first += most_bins) {
      const int count = static_cast<int>(min_of(most_bins, params.index.buckets - first));
      for (int c = 0; c < count; ++c) bins[c * kTurned + lane] = 0;
      __syncwarp();
      for (int64_t chunk = 0; chunk < params.keys; chunk += kWarp) {
        turn(y, chunk, params.keys, tile);
        __syncwarp();
        const int members = static_cast<int>(min_of(kWarp, params.keys - chunk));
        for (int k = 0; k < members; k += kGatherAtOnce) {
          int32_t buckets[kGatherAtOnce];
#pragma unroll
          for (int i = 0; i < kGatherAtOnce; ++i) {
            if (k + i < members) buckets[i] = index[chunk + k + i];
          }
#pragma unroll
          for (int i = 0; i < kGatherAtOnce; ++i) {
            if (k + i >= members) break;
            const bool known = static_cast<uint32_t>(buckets[i]) < params.index.buckets;
            const uint32_t bin = (known ? buckets[i] : 0) - static_cast<uint32_t>(first);
            if (bin < static_cast<uint32_t>(count)) {
              bins[bin * kTurned + lane] += known ? tile[(k + i) * kTurned + lane] : kNaN<Acc>;
            }
          }
        }
        __syncwarp();
      }
      for (int r = 0; r < min_of(kWarp, rows - base); ++r) {
        T* to = reinterpret_cast<T*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(x), r)) + first;
        for (int c = lane; c < count; c += kWarp) round_to(bins[c * kTurned + r], to[c]);
      }
      __syncwarp();
    }
  }
}

}  // namespace natrpb::cuda::irpe
