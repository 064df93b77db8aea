// The query pass of local attention's backward on tensor cores: dquery and the bias table's gradient.
//
//   delta_i = <dout_i, out_i> - dlse_i,   ds_ij = p_ij (<dout_i, value_j> - delta_i),   p_ij = exp(s_ij - lse_i)
//   dquery_i = scale sum_j ds_ij key_j,   drpb[j - i + K - 1] = sum ds_ij
//
// Grid: h * runs CTAs. A CTA belongs to one head and goes through a run of items, an item being a CTA tile and a batch entry,
// the batch innermost. Each of its warps owns one tile of 16 queries and keeps the sums of ds over items in the accumulator's
// own order: in registers for up to 112 keys, else in memory that is the warp's alone. Only where the tile's class changes are
// they gathered into the warp's own bias table, so there are no atomics and the order of every sum is fixed by the shapes.
// Each warp's table goes to p.partials; a reduction adds them up. Bytes: query, key, value, out, dout, lse in, dquery, stats out
// once from DRAM; keys and values halo / tile times from L2.
#pragma once

#include "cuda/local_attention_mma_columns.cuh"

namespace natrpb::cuda::mma {

// Adds the sums of a tile's ds to the warp's bias table: table[e] += sum over rows r of sums[r, column at offset e from r].
__device__ __attribute__((noinline)) static void gather_table(const Params& p, const Tile& tile, const float* sums,
                                                              float* table) {
  const Axis(&axis)[kAxes] = p.op.axis;
  const int32_t extent[kAxes] = {static_cast<int32_t>(2 * axis[0].kernel_size - 1),
                                 static_cast<int32_t>(2 * axis[1].kernel_size - 1),
                                 static_cast<int32_t>(2 * axis[2].kernel_size - 1)};
  for (int32_t entry = threadIdx.x % 32; entry < p.entries; entry += 32) {
    const int32_t line = entry / extent[2];
    const int32_t e[kAxes] = {line / extent[1], line % extent[1], entry % extent[2]};
    float sum = 0.0f;
    for (int32_t r = 0; r < kTileRows; ++r) {
      bool seen = tile.has(r);
      int32_t j = 0;
#pragma unroll
      for (int a = 0; a < kAxes; ++a) {
        const int32_t column = tile.row_first[a] + p.tiling.axis[a].step_of(r) + e[a] -
                               static_cast<int32_t>(axis[a].kernel_size - 1) - tile.col_first[a];
        seen &= 0 <= column && column < tile.cols[a];
        j = j * tile.cols[a] + column;
      }
      // sums[pair][half][lane][element], see ptx.cuh for an accumulator's layout; what row r does not see is 0 there
      if (seen) sum += sums[((j / 8 * 32) + r % 8 * 4 + j % 8 / 2) * 4 + r / 8 * 2 + j % 2];
    }
    table[entry] += sum;
  }
}

__device__ __forceinline__ void find_place(const Params& p, Place& place, int32_t head, int32_t item) {
  const int32_t batch = static_cast<int32_t>(p.op.batch);
  place.find(p, item % batch, head, item / batch);
}

template <class T>
__device__ __attribute__((noinline)) void redo_query(const Params& p, WarpState& state, int32_t item) {
  __syncwarp();
  find_place(p, state.place, state.head, item);
  __syncwarp();
  Tile& tile = state.tile;
  if (threadIdx.x % 32 == 0) tile.find(p, state.place, threadIdx.x / 32);
  __syncwarp();
  if (!tile.exists()) return;
  redo_rows(p, state.place, tile, [&](const Row& row) {
    float2* stats = p.stats + (row.batch * p.op.heads + row.head) * positions_of(p.op) + flat_position(p.op, row.position);
    backward_query_row<T, kVector<T>>(p.op, row, &stats->y, nullptr);
  });
}

// Sums of ds in registers, or, for more than kChunkPairs pairs and without a table, behind a pointer that may be null.
template <bool kInRegisters>
struct Sums;
template <>
struct Sums<true> {
  float sum[kChunkPairs][2][4] = {};

  __device__ void add(int32_t, int i, const float (&ds)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][n][e] += ds[n][e];
    }
  }
};
template <>
struct Sums<false> {
  float4* memory = nullptr;  // this lane's

  __device__ void add(int32_t pair, int, const float (&ds)[2][4]) {
    if (memory == nullptr) return;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float4& sum = memory[pair * kPairFloat4 + n * 32];
      sum = {sum.x + ds[n][0], sum.y + ds[n][1], sum.z + ds[n][2], sum.w + ds[n][3]};
    }
  }
};

// Returns whether the tile's results are finite.
template <class T, int kDim, bool kInRegisters>
__device__ bool query_tile(const Params& p, const CtaState& cta, const Tile& tile, unsigned char* shared,
                           Sums<kInRegisters>& sums) {
  namespace tensor = query_tensor;
  const unsigned char* keys = shared;
  const unsigned char* values = shared + p.tiling.positions * (kDim * 2);
  const float scale = static_cast<float>(p.op.scale) * kLog2E;
  const Columns<kDim> columns(p, tile);
  const float4* fragments = cta.fragments_of(tile);
  const int32_t pairs = tile.pairs;

  uint32_t query[kDim / 16][4], dout[kDim / 16][4];
  float lse[2], delta[2] = {0.0f, 0.0f};
  {
    const LaneRows rows(p, tile);
    const float* given[2];
    float dlse[2] = {0.0f, 0.0f};
    if (p.op.dlse.data) {
      rows.find(p, cta, tensor::kDlse, 0, given);
#pragma unroll
      for (int half = 0; half < 2; ++half) dlse[half] = __uint_as_float(ptx::load_4(given[half], rows.there[half]));
    }
    rows.find(p, cta, tensor::kLse, 0, given);
#pragma unroll
    for (int half = 0; half < 2; ++half) lse[half] = __uint_as_float(ptx::load_4(given[half], rows.there[half])) * kLog2E;
    load_rows<T, kDim>(dout, p, cta, rows, tensor::kDout, p.op.value_dim);
    {
      uint32_t out[kDim / 16][4];
      load_rows<T, kDim>(out, p, cta, rows, tensor::kOut, p.op.value_dim);
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = ptx::unpack<T>(dout[k][i]), y = ptx::unpack<T>(out[k][i]);
          delta[i % 2] += x.x * y.x + x.y * y.y;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) delta[half] = quad_sum(delta[half]) - dlse[half];
    load_rows<T, kDim>(query, p, cta, rows, tensor::kQuery, p.op.head_dim);
    uint2* stats[2];
    rows.find(p, cta, tensor::kStats, 0, stats);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (threadIdx.x % 4 != 0 || !rows.there[half]) continue;
      ptx::store_8(stats[half], {__float_as_uint(lse[half]), __float_as_uint(delta[half])});
    }
  }

  float dquery[kDim / 8][4] = {};
  auto add_pair = [&](int32_t pair, int i) {
    float s[2][4], dp[2][4];
    start_from(s, fragments + pair * kPairFloat4);
    bool seen[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        seen[n][e] = s[n][e] != -INFINITY;
        dp[n][e] = -delta[e / 2];
      }
    }
    const uint32_t found = columns.find(pair);
    const int32_t straight = columns.straight(found), transposed = columns.transposed(found);
    multiply_straight<T, kDim>(s, query, keys, straight);
    multiply_straight<T, kDim>(dp, dout, values, straight);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float ds = ptx::exp2_approx(s[n][e] * scale - lse[e / 2]) * dp[n][e];
        s[n][e] =
            seen[n][e] ? ds : 0.0f;  // NB: a column that is not finite must not reach the sums of pairs that do not see it
      }
    }
    sums.add(pair, i, s);
    uint32_t ds[4];
    to_operand<T>(ds, s);
    multiply_transposed<T, kDim>(dquery, ds, keys, transposed);
  };
  for (int32_t first = 0; first < pairs; first += kChunkPairs) {
    if (p.tiling.streamed) {
      stage_chunk<kDim>(p, cta, tile, first, p.op.head_dim, p.op.value_dim, shared);
    }
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kChunkPairs; ++i) {
        if (i < pairs) add_pair(i, i);
      }
    } else {
      for (int32_t pair = first; pair < min_of(first + kChunkPairs, pairs); ++pair) add_pair(pair, 0);
    }
  }

  const LaneRows rows(p, tile);  // found anew: registers are scarce above
  if (any_bad(dquery, rows)) return false;
  const float factor = static_cast<float>(p.op.scale);
  store_rows<T, kDim>(dquery, {factor, factor}, p, cta, rows, tensor::kDquery, p.op.head_dim);
  return true;
}

template <class T, int kDim, bool kInRegisters>
__global__ void __launch_bounds__(kMaxWarps * 32, kDim <= 32   ? kBackwardBlocks
                                                  : kDim == 64 ? 2
                                                               : 1) query_kernel(const __grid_constant__ Params p) {
  CtaState& cta = *shared_memory<CtaState>();
  Place& place = cta.place;
  WarpState* states = reinterpret_cast<WarpState*>(&cta + 1);
  WarpState& state = states[threadIdx.x / 32];
  float4* shared_sums = reinterpret_cast<float4*>(states + p.tiling.warps);
  const int32_t sums_size = p.partials ? p.tiling.pairs * kPairFloat4 : 0;  // of a warp
  unsigned char* shared = reinterpret_cast<unsigned char*>(p.sums ? shared_sums : shared_sums + p.tiling.warps * sums_size);

  // This warp's, found anew wherever they are needed: registers are scarce.
  auto owner = [&] { return static_cast<int64_t>(blockIdx.x) * p.tiling.warps + threadIdx.x / 32; };
  auto table = [&] { return p.partials + owner() * p.entries; };  // [h, runs, warps, entries]
  auto memory = [&] {
    float4* shared = shared_sums + threadIdx.x / 32 * sums_size;
    return (kInRegisters || !p.sums ? shared : p.sums + owner() * sums_size) + threadIdx.x % 32;
  };
  auto clear = [&] {
    for (int32_t i = 0; i < sums_size; i += 32) memory()[i] = {0.0f, 0.0f, 0.0f, 0.0f};
  };

  if (p.partials) {
    if constexpr (!kInRegisters) clear();
    for (int32_t entry = threadIdx.x % 32; entry < p.entries; entry += 32) table()[entry] = 0.0f;
  }
  auto flush = [&](const Sums<kInRegisters>& sums) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kChunkPairs; ++i) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (i >= p.tiling.pairs) continue;
          const float (&sum)[4] = sums.sum[i][n];
          memory()[i * kPairFloat4 + n * 32] = {sum[0], sum[1], sum[2], sum[3]};
        }
      }
    }
    __syncwarp();
    gather_table(p, state.tile, reinterpret_cast<const float*>(memory() - threadIdx.x % 32), table());
    __syncwarp();
    if constexpr (!kInRegisters) clear();
  };

  const int64_t items = p.tiling.ctas * p.op.batch;  // of a head, below 2^31
  int32_t item = static_cast<int32_t>(items * (blockIdx.x % p.runs) / p.runs);
  if (threadIdx.x % 32 == 0) {
    state.head = blockIdx.x / p.runs;
    state.end = static_cast<int32_t>(items * (blockIdx.x % p.runs + 1) / p.runs);
    state.first_bad = state.end_bad = state.end;
  }
  auto enter = [&](int32_t item, bool first) {
    const int32_t batch = item % static_cast<int32_t>(p.op.batch);
    const bool moves = first || batch == 0;  // to another CTA tile
    __syncthreads();                         // everyone is done with the item before
    if (threadIdx.x < 32) {
      if (moves) find_place(p, place, state.head, item);
      if (threadIdx.x == 0 && !moves) place.batch = batch;
      __syncwarp();
      cta.find_bases(p, query_tensor::kCount);
    }
    __syncthreads();
    Tile& tile = cta.tile[threadIdx.x / 32];
    if (moves) {
      if (threadIdx.x % 32 == 0) tile.find(p, place, threadIdx.x / 32);
      __syncwarp();
    }
    return tile.exists() ? tile.first_pair : -1;
  };
  int32_t next = enter(item, true);  // class of the warp's tile, -1: it has none
  while (item < state.end) {
    Sums<kInRegisters> sums;
    if constexpr (!kInRegisters) sums.memory = p.partials ? memory() : nullptr;
    int32_t klass = -1;  // of the tile whose ds the sums hold; -1: none
    do {
      if (!p.tiling.streamed) {
        stage_halo<kDim>(p, cta, p.op.head_dim, p.op.value_dim, shared);
      }
      if (next >= 0) {
        klass = next;
        static_assert(sizeof(Tile) <= 32 * sizeof(int32_t));
        if (threadIdx.x % 32 < sizeof(Tile) / sizeof(int32_t)) {
          const int32_t word = threadIdx.x % 32;
          reinterpret_cast<int32_t*>(&state.tile)[word] = reinterpret_cast<int32_t*>(&cta.tile[threadIdx.x / 32])[word];
        }
      }
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (next >= 0 && !query_tile<T, kDim, kInRegisters>(p, cta, state.tile, shared, sums) && threadIdx.x % 32 == 0) {
        if (state.first_bad == state.end) state.first_bad = item;
        state.end_bad = item + 1;
      }
      if (++item < state.end) next = enter(item, false);
    } while (item < state.end && (klass < 0 || next < 0 || next == klass));
    if (p.partials && klass >= 0) flush(sums);
  }
  __syncwarp();
  for (item = state.first_bad; item < state.end_bad; ++item) redo_query<T>(p, state, item);
}

}  // namespace natrpb::cuda::mma
