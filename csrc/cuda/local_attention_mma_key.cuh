// The key pass of local attention's backward on tensor cores: dkey and dvalue. The tile of 16 rows are keys, the columns are
// the queries that see them (the inverse neighborhood), so nothing is ever added to memory that another warp writes.
//
//   dvalue_j = sum_i p_ij dout_i,   dkey_j = scale sum_i ds_ij query_i
//   p_ij = exp(s_ij - lse_i),       ds_ij = p_ij (<dout_i, value_j> - delta_i)
//
// Grid: one CTA per batch entry, head, residue group and CTA tile, as in the forward; shared memory holds query and dout of the
// halo, and for each warp lse and -delta of a chunk of columns. After the query pass, which writes lse and delta [B, h, *].
// A width of 128 takes two sweeps, since the sums of dkey and dvalue together do not fit a thread's registers.
// Bytes: query, key, value, dout, lse, delta in, dkey, dvalue out once from DRAM; query and dout halo / tile times from L2.
#pragma once

#include "cuda/local_attention_mma_columns.cuh"

namespace natrpb::cuda::mma {

inline constexpr int kChunkColumns = kChunkPairs * kPairColumns;

template <class T>
__device__ __attribute__((noinline)) void redo_key(const Params& p, CtaState& state, int32_t number) {
  redo_rows(p, state.place, state.tile[number],
            [&](const Row& row) { backward_key_row<T, kVector<T>>(p.op, row, &p.stats->y, 2); });
}

// lse and -delta of a tile's columns, from pair `first` on, to the warp's part of shared memory.
__device__ __forceinline__ void load_stats(const Params& p, const CtaState& cta, const Tile& tile, int32_t first,
                                           float2* stats) {
  const Box box = tile.columns();
  const int32_t begin = first * kPairColumns;
  __syncwarp();
  for (int32_t j = begin + threadIdx.x % 32; j < begin + kChunkColumns && j < ceil_div(box.count, kPairColumns) * kPairColumns;
       j += 32) {
    int32_t i[kAxes];
    box.unravel(j < box.count ? j : box.count - 1, i);
    const uint2 bits = ptx::load_8(cta.at(p, key_tensor::kStats, i));
    stats[j - begin] = {__uint_as_float(bits.x), -__uint_as_float(bits.y)};
  }
  __syncwarp();
}

// dkey, dvalue or both of a tile; returns whether they are finite.
template <class T, int kDim, bool kWantsKey, bool kWantsValue>
__device__ bool key_tile(const Params& p, const CtaState& cta, const Tile& tile, float2* stats, unsigned char* shared) {
  namespace tensor = key_tensor;
  const unsigned char* queries = shared;
  const unsigned char* douts = shared + p.tiling.positions * (kDim * 2);
  const float scale = static_cast<float>(p.op.scale) * kLog2E;
  Columns<kDim> columns(p, tile);
  const float4* fragments = cta.fragments_of(tile);
  const int32_t pairs = tile.pairs;

  uint32_t key[kDim / 16][4], value[kDim / 16][4];
  {
    const LaneRows rows(p, tile);
    load_rows<T, kDim>(key, p, cta, rows, tensor::kKey, p.op.head_dim);
    if constexpr (kWantsKey) load_rows<T, kDim>(value, p, cta, rows, tensor::kValue, p.op.value_dim);
  }
  float dkey[kDim / 8][4] = {}, dvalue[kDim / 8][4] = {};

  for (int32_t first = 0; first < pairs; first += kChunkPairs) {
    if (p.tiling.streamed) {
      stage_chunk<kDim>(p, cta, tile, first, p.op.head_dim, p.op.value_dim, shared);
    }
    load_stats(p, cta, tile, first, stats);
    const float2* pair_stats = stats + threadIdx.x % 4 * 2;
#pragma unroll 1
    for (int32_t left = static_cast<int32_t>(min_of(pairs - first, kChunkPairs)); left > 0; --left) {
      float s[2][4], dp[2][4];
      const uint32_t found = columns.find(0);
      const int32_t straight = columns.straight(found), transposed = columns.transposed(found);
      start_from(s, fragments);
      multiply_straight<T, kDim>(s, key, queries, straight);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        // lse and -delta of the lane's two columns
        const uint4 x = ptx::load_shared_16(pair_stats + n * 8);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[n][e] = ptx::exp2_approx(s[n][e] * scale - __uint_as_float(e % 2 ? x.z : x.x));
          dp[n][e] = __uint_as_float(e % 2 ? x.w : x.y);
        }
      }
      uint32_t operand[4];
      to_operand<T>(operand, s);
      if constexpr (kWantsValue) multiply_transposed<T, kDim>(dvalue, operand, douts, transposed);
      if constexpr (kWantsKey) {
        multiply_straight<T, kDim>(dp, value, douts, straight);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] *= dp[n][e];
        }
        to_operand<T>(operand, s);
        multiply_transposed<T, kDim>(dkey, operand, queries, transposed);
      }
      columns.advance(1);
      fragments += kPairFloat4;
      pair_stats += kPairColumns;
    }
  }

  const LaneRows rows(p, tile);  // found anew: registers are scarce above
  if ((kWantsKey && any_bad(dkey, rows)) || (kWantsValue && any_bad(dvalue, rows))) return false;
  if constexpr (kWantsKey) {
    const float factor = static_cast<float>(p.op.scale);
    store_rows<T, kDim>(dkey, {factor, factor}, p, cta, rows, tensor::kDkey, p.op.head_dim);
  }
  if constexpr (kWantsValue) store_rows<T, kDim>(dvalue, {1.0f, 1.0f}, p, cta, rows, tensor::kDvalue, p.op.value_dim);
  return true;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kMaxWarps * 32, kDim <= 32   ? kBackwardBlocks
                                                  : kDim == 64 ? 2
                                                               : 1) key_kernel(const __grid_constant__ Params p) {
  CtaState& state = *shared_memory<CtaState>();
  Place& place = state.place;
  float2* stats = reinterpret_cast<float2*>(&state + 1);  // [warps, kChunkColumns]
  unsigned char* shared = reinterpret_cast<unsigned char*>(stats + p.tiling.warps * kChunkColumns);
  if (threadIdx.x < 32) {
    const uint32_t map = blockIdx.x / static_cast<uint32_t>(p.tiling.ctas);  // batch * heads + head
    place.find(p, map / static_cast<uint32_t>(p.op.heads), map % static_cast<uint32_t>(p.op.heads),
               blockIdx.x % static_cast<uint32_t>(p.tiling.ctas));
    __syncwarp();
    state.find_bases(p, key_tensor::kCount);
  }
  __syncthreads();
  if (!p.tiling.streamed) stage_halo<kDim>(p, state, p.op.head_dim, p.op.value_dim, shared);
  const int32_t thread = threadIdx.x;
  if (thread < p.tiling.cta_tiles) state.tile[thread].find(p, place, thread);
  uint32_t& bad = state.bad[threadIdx.x / 32];
  if (threadIdx.x % 32 == 0) bad = 0;
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int32_t number = threadIdx.x / 32; number < p.tiling.cta_tiles; number += p.tiling.warps) {
    const Tile& tile = state.tile[number];
    if (!tile.exists()) continue;
    float2* const own = stats + threadIdx.x / 32 * kChunkColumns;
    bool good;
    if constexpr (kDim <= 64) {
      good = key_tile<T, kDim, true, true>(p, state, tile, own, shared);
    } else {
      good = key_tile<T, kDim, true, false>(p, state, tile, own, shared) &
             key_tile<T, kDim, false, true>(p, state, tile, own, shared);
    }
    if (!good && threadIdx.x % 32 == 0) bad |= 1u << number;
  }
  __syncwarp();
  for (uint32_t left = bad; left != 0; left &= left - 1) redo_key<T>(p, state, __ffs(left) - 1);
}

}  // namespace natrpb::cuda::mma
