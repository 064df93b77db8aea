// Local attention's forward on tensor cores.
//
//   out_i = sum_j exp(s_ij - lse_i) value_j,   s_ij = scale <query_i, key_j> + rpb[j - i + K - 1]
//
// Grid: one CTA per batch entry, head, residue group and CTA tile. A CTA copies its halo of key and value to shared memory
// (cp.async), then its warps take the CTA's tiles in turn, 16 queries each: scores of up to 112 keys stay in registers, their
// softmax is exact; more keys follow by the online softmax. From DRAM query, key, value, out and lse move once; from L2 keys and
// values halo / tile times (1.9 for 16 x 16 queries and K = 7).
#pragma once

#include "cuda/local_attention_mma_columns.cuh"

namespace natrpb::cuda::mma {

template <class T>
__device__ __attribute__((noinline)) void redo_forward(const Params& p, CtaState& state, int32_t number) {
  redo_rows(p, state.place, state.tile[number], [&](const Row& row) { forward_row<T, kVector<T>>(p.op, row); });
}

// A tile's rows of out and what the online softmax knows of them.
template <int kDim>
struct Softmax {
  float out[kDim / 8][4] = {};
  float peak[2] = {-INFINITY, -INFINITY};  // of the products, hence in units of 1 / scale
  float total[2] = {0.0f, 0.0f};           // this lane's share of sum exp2(scale (product - peak))
};

// Adds `pairs` pairs of columns, at most kChunkPairs; if kFull exactly as many, without a branch, so that loads run ahead.
template <class T, int kDim, bool kFull>
__device__ void add_chunk(Softmax<kDim>& sums, const uint32_t (&query)[kDim / 16][4], const Columns<kDim>& columns,
                          const float4* fragments, bool first, int32_t pairs, float scale, const unsigned char* keys,
                          const unsigned char* values) {
  float s[kChunkPairs][2][4];
  uint32_t found[kChunkPairs];
  float top[2] = {sums.peak[0], sums.peak[1]};
#pragma unroll
  for (int i = 0; i < kChunkPairs; ++i) {
    if (kFull || i < pairs) {
      start_from(s[i], fragments + i * kPairFloat4);
      found[i] = columns.find(i);
      multiply_straight<T, kDim>(s[i], query, keys, columns.straight(found[i]));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        top[0] = fmaxf(top[0], fmaxf(s[i][n][0], s[i][n][1]));
        top[1] = fmaxf(top[1], fmaxf(s[i][n][2], s[i][n][3]));
      }
    }
  }
  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = quad_max(top[half]);
    shift[half] = top[half] == -INFINITY ? 0.0f : top[half] * scale;  // no key of this row so far
    if (!first) {
      const float shrink = ptx::exp2_approx(sums.peak[half] * scale - shift[half]);
      sums.total[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        sums.out[n][2 * half] *= shrink;
        sums.out[n][2 * half + 1] *= shrink;
      }
    }
    sums.peak[half] = top[half];
  }
#pragma unroll
  for (int i = 0; i < kChunkPairs; ++i) {
    if (kFull || i < pairs) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[i][n][e] = ptx::exp2_approx(s[i][n][e] * scale - shift[e / 2]);
          sums.total[e / 2] += s[i][n][e];
        }
      }
      uint32_t weights[4];
      to_operand<T>(weights, s[i]);
      multiply_transposed<T, kDim>(sums.out, weights, values, columns.transposed(found[i]));
    }
  }
}

// Returns whether the tile's results are finite.
template <class T, int kDim>
__device__ bool forward_tile(const Params& p, const CtaState& cta, const Tile& tile, unsigned char* shared) {
  namespace tensor = forward_tensor;
  const unsigned char* keys = shared;
  const unsigned char* values = shared + p.tiling.positions * (kDim * 2);
  const float scale = static_cast<float>(p.op.scale) * kLog2E;
  Columns<kDim> columns(p, tile);
  const float4* fragments = cta.fragments_of(tile);

  uint32_t query[kDim / 16][4];
  load_rows<T, kDim>(query, p, cta, LaneRows(p, tile), tensor::kQuery, p.op.head_dim);
  Softmax<kDim> sums;
  for (int32_t first = 0; first < tile.pairs; first += kChunkPairs) {
    if (p.tiling.streamed) stage_chunk<kDim>(p, cta, tile, first, p.op.head_dim, p.op.value_dim, shared);
    const int32_t pairs = tile.pairs - first;
    if (kFullChunks && pairs >= kChunkPairs) {
      add_chunk<T, kDim, kFullChunks>(sums, query, columns, fragments, first == 0, pairs, scale, keys, values);
    } else {
      add_chunk<T, kDim, false>(sums, query, columns, fragments, first == 0, pairs, scale, keys, values);
    }
    columns.advance(kChunkPairs);
    fragments += kChunkPairs * kPairFloat4;
  }

  float (&out)[kDim / 8][4] = sums.out;
  float (&total)[2] = sums.total;
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = quad_sum(total[half]);
    factor[half] = ptx::rcp_approx(total[half]);  // of at least 1, the peak's own share
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      out[n][2 * half] *= factor[half];
      out[n][2 * half + 1] *= factor[half];
    }
  }
  const LaneRows rows(p, tile);  // found anew: registers are scarce above
  if (any_bad(out, rows)) return false;
  store_rows<T, kDim>(out, {1.0f, 1.0f}, p, cta, rows, tensor::kOut, p.op.value_dim);
  float* lse[2];
  rows.find(p, cta, tensor::kLse, 0, lse);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (threadIdx.x % 4 != 0 || !rows.there[half]) continue;
    ptx::store_4(lse[half], __float_as_uint(kLn2 * (sums.peak[half] * scale + ptx::log2_approx(total[half]))));
  }
  return true;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kMaxWarps * 32, kDim <= 32   ? 3
                                                  : kDim == 64 ? 2
                                                               : 1) forward_kernel(const __grid_constant__ Params p) {
  CtaState& state = *shared_memory<CtaState>();
  Place& place = state.place;
  unsigned char* shared = reinterpret_cast<unsigned char*>(&state + 1);
  if (threadIdx.x < 32) {
    const uint32_t map = blockIdx.x / static_cast<uint32_t>(p.tiling.ctas);  // batch * heads + head
    place.find(p, map / static_cast<uint32_t>(p.op.heads), map % static_cast<uint32_t>(p.op.heads),
               blockIdx.x % static_cast<uint32_t>(p.tiling.ctas));
    __syncwarp();
    state.find_bases(p, forward_tensor::kCount);
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
    if (tile.exists() && !forward_tile<T, kDim>(p, state, tile, shared) && threadIdx.x % 32 == 0) bad |= 1u << number;
  }
  __syncwarp();
  for (uint32_t left = bad; left != 0; left &= left - 1) redo_forward<T>(p, state, __ffs(left) - 1);
}

}  // namespace natrpb::cuda::mma
