// Lays out what the tensor-core kernels read: spans and halos of tiles, and the fragments their score products start from.
//
//   fragment[head, class, column pair][half][lane][e] = rpb[head, key - query + K - 1] / scale, or -inf
//
// for row lane / 4 + e / 2 * 8 and column half * 8 + lane % 4 * 2 + e % 2 of the pair, as an accumulator has them (ptx.cuh);
// -inf where the row does not see the column, or one of them is not there.
//
//   columns[class, column pair][lane] = positions of the two columns whose rows the lane addresses (Columns)
//
// One thread per float4, word, span or halo.
#pragma once

#include "cuda/local_attention_mma_columns.cuh"

namespace natrpb::cuda::mma {

struct Preparation {
  Tiling tiling;
  const float* rpb = nullptr;  // [heads, 2 K_0 - 1, 2 K_1 - 1, 2 K_2 - 1]
  int64_t heads = 1;           // of the fragments; 1 without a bias
  float scale = 1.0f;
  TileSpan* spans = nullptr;    // [tiling.spans]
  HaloSpan* halos = nullptr;    // [tiling.halos]
  float4* fragments = nullptr;  // [heads, classes, pairs, 2, 32]
  uint32_t* columns = nullptr;  // [classes, pairs, 32]
};

// The tile that stands for a class.
struct ClassTile {
  TileSpan span[kAxes];
  int32_t size[kAxes];  // of its groups
  bool exists = true;

  __device__ ClassTile(const Tiling& tiling, int32_t klass) {
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      const AxisTiling& axis = tiling.axis[a];
      const AxisTiling::Member member = axis.member_of(klass % axis.classes);
      klass /= axis.classes;
      exists = exists && member.tile >= 0;
      if (!exists) return;
      span[a] = axis.span_of(member.which, member.tile);
      size[a] = axis.length[member.which];
      exists = span[a].rows > 0;
    }
  }
};

__device__ __forceinline__ float fragment_value(const Preparation& p, const ClassTile& tile, int64_t head, int32_t r,
                                                int32_t j) {
  int64_t entry = head;
  int32_t at[kAxes], column[kAxes];
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    at[a] = p.tiling.axis[a].step_of(r);
    if (at[a] >= tile.span[a].rows) return -INFINITY;
    column[a] = a > 0 ? j % tile.span[a].cols : j;
    j /= tile.span[a].cols;
  }
  if (column[0] >= tile.span[0].cols) return -INFINITY;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const AxisTiling& axis = p.tiling.axis[a];
    const int64_t row = tile.span[a].row_first + at[a], other = tile.span[a].col_first + column[a];
    if (!axis.cols_of(row, tile.size[a]).contains(other)) return -INFINITY;
    const int64_t index = axis.transposed ? axis.axis.bias_index(other, row) : axis.axis.bias_index(row, other);
    entry = entry * (2 * axis.axis.kernel_size - 1) + index;
  }
  return p.rpb ? p.rpb[entry] / p.scale : 0.0f;
}

// Position of a tile's column in shared memory, relative to that of its first; past the last column that of the last.
__device__ __forceinline__ uint32_t column_position(const Tiling& tiling, const ClassTile& tile, int32_t j) {
  const int32_t rows = tile.span[1].cols, row = tile.span[2].cols;
  j = static_cast<int32_t>(min_of(j, tile.span[0].cols * rows * row - 1));
  if (tiling.streamed) return j % (kChunkPairs * kPairColumns);  // of the chunk that is staged
  return j / row / rows * tiling.plane + j / row % rows * tiling.pitch + j % row;
}

__global__ void prepare_kernel(const __grid_constant__ Preparation p) {
  const int64_t fragments = p.tiling.fragments(p.heads);
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < fragments) {
    const int32_t lane = index % 32, half = index / 32 % 2;
    const int32_t pair = static_cast<int32_t>(index / kPairFloat4 % p.tiling.pairs);
    const int64_t owner = index / kPairFloat4 / p.tiling.pairs;  // head * classes + class
    const ClassTile tile(p.tiling, static_cast<int32_t>(owner % p.tiling.classes));
    if (!tile.exists) return;
    const int64_t head = owner / p.tiling.classes;
    const int32_t row = lane / 4, column = pair * kPairColumns + half * 8 + lane % 4 * 2;
    p.fragments[index] = {fragment_value(p, tile, head, row, column), fragment_value(p, tile, head, row, column + 1),
                          fragment_value(p, tile, head, row + 8, column), fragment_value(p, tile, head, row + 8, column + 1)};
    return;
  }
  index -= fragments;
  const int64_t words = p.tiling.column_words();
  if (index < words) {
    const int32_t lane = index % 32, first = static_cast<int32_t>(index / 32 % p.tiling.pairs) * kPairColumns;
    const ClassTile tile(p.tiling, static_cast<int32_t>(index / 32 / p.tiling.pairs));
    if (!tile.exists) return;
    p.columns[index] = column_position(p.tiling, tile, first + straight_column(lane)) |
                       column_position(p.tiling, tile, first + transposed_column(lane)) << 16;
    return;
  }
  index -= words;
  // span[a][which][tile] and, behind all spans, halo[a][which][cta]
  for (int a = 0; a < kAxes; ++a) {
    const AxisTiling& axis = p.tiling.axis[a];
    const int64_t at = index - p.tiling.span_base[a];
    if (0 <= at && at < axis.lengths * axis.tiles[0]) {
      TileSpan span = axis.span_of(static_cast<int32_t>(at / axis.tiles[0]), static_cast<int32_t>(at % axis.tiles[0]));
      for (int32_t r = 0; r < kTileRows; ++r) span.there |= static_cast<uint32_t>(axis.step_of(r) < span.rows) << r;
      p.spans[index] = span;
    }
  }
  index -= p.tiling.spans;
  for (int a = 0; a < kAxes; ++a) {
    const AxisTiling& axis = p.tiling.axis[a];
    const int64_t at = index - p.tiling.halo_base[a];
    if (0 <= at && at < axis.lengths * axis.ctas) {
      p.halos[index] = axis.halo_of(static_cast<int32_t>(at / axis.ctas), static_cast<int32_t>(at % axis.ctas));
    }
  }
}

}  // namespace natrpb::cuda::mma
