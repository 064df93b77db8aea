// Lays out what the tensor-core kernels read: spans and halos of tiles, and the fragments their score products start from.
//
//   fragment[head, class, column pair][half][lane][e] = rpb[head, key - query + K - 1] / scale, or -inf
//
// for row lane / 4 + e / 2 * 8 and column half * 8 + lane % 4 * 2 + e % 2 of the pair, as an accumulator has them (ptx.cuh);
// -inf where the row does not see the column, or one of them is not there.
//
//   columns[class, column pair][lane] = positions of the two columns whose rows the lane addresses (Columns)
//
// A CTA lays out one class: its threads find what each row of the class's tile sees on each axis, then the fragments and words.
// Further CTAs write spans and halos, a thread for each.
#pragma once

#include "cuda/local_attention_mma_columns.cuh"

namespace natrpb::cuda::mma {

struct Preparation {
  Tiling tiling;
  const float* rpb = nullptr;  // [heads, 2 K_0 - 1, 2 K_1 - 1, 2 K_2 - 1]
  int64_t heads = 1;           // of the fragments; 1 without a bias
  int32_t parts = 1;           // CTAs of a class
  float scale = 1.0f;
  TileSpan* spans = nullptr;    // [tiling.spans]
  HaloSpan* halos = nullptr;    // [tiling.halos]
  float4* fragments = nullptr;  // [heads, classes, pairs, 2, 32]
  uint32_t* columns = nullptr;  // [classes, pairs, 32]
};

inline constexpr int kPrepareThreads = 128;

// The columns that a row of the tile sees on one axis, relative to the tile's first; none if first > last.
struct RowColumns {
  int32_t first, last;
  int32_t bias;  // of column 0 the index into this axis of the table, which grows, or where the rows are keys falls, by one
};

// The tile that stands for a class.
struct ClassTile {
  TileSpan span[kAxes];
  int32_t size[kAxes];  // of its groups
  RowColumns row[kAxes][kTileRows];

  // Called by all threads of a block; false for all of them where the class has no tile.
  __device__ bool describe(const Tiling& tiling, int32_t klass) {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    if (thread < kAxes) {
      for (int a = kAxes - 1; a > thread; --a) klass /= tiling.axis[a].classes;
      const AxisTiling& axis = tiling.axis[thread];
      const AxisTiling::Member member = axis.member_of(klass % axis.classes);
      span[thread] = member.tile < 0 ? TileSpan{} : axis.span_of(member.which, member.tile);
      size[thread] = axis.length[member.which];
    }
    __syncthreads();
    if (span[0].rows == 0 || span[1].rows == 0 || span[2].rows == 0) return false;
    if (thread < kAxes * kTileRows) {
      const int a = thread / kTileRows, r = thread % kTileRows;
      const AxisTiling& axis = tiling.axis[a];
      RowColumns columns{1, 0, 0};
      if (r < span[a].rows) {
        const int64_t at = span[a].row_first + r, start = span[a].col_first;
        const Interval seen = axis.cols_of(at, size[a]);
        columns.first = static_cast<int32_t>(seen.first - start);
        columns.last = static_cast<int32_t>(seen.last - start);
        columns.bias =
            static_cast<int32_t>(axis.transposed ? axis.axis.bias_index(start, at) : axis.axis.bias_index(at, start));
      }
      row[a][r] = columns;
    }
    __syncthreads();
    return true;
  }
};

// `table` is the head's, or null without a bias.
__device__ __forceinline__ float fragment_value(const Preparation& p, const ClassTile& tile, const float* table, int32_t r,
                                                const int32_t (&column)[kAxes]) {
  int64_t entry = 0;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const AxisTiling& axis = p.tiling.axis[a];
    const RowColumns& row = tile.row[a][axis.step_of(r)];
    if (column[a] < row.first || column[a] > row.last) return -INFINITY;
    entry = entry * (2 * axis.axis.kernel_size - 1) + (axis.transposed ? row.bias - column[a] : row.bias + column[a]);
  }
  return table ? table[entry] / p.scale : 0.0f;
}

// Position of a tile's column in shared memory, relative to that of its first; past the last column that of the last.
__device__ __forceinline__ uint32_t column_position(const Tiling& tiling, const ClassTile& tile, int32_t j) {
  const int32_t rows = tile.span[1].cols, row = tile.span[2].cols;
  j = static_cast<int32_t>(min_of(j, tile.span[0].cols * rows * row - 1));
  if (tiling.streamed) return j % (kChunkPairs * kPairColumns);  // of the chunk that is staged
  return j / row / rows * tiling.plane + j / row % rows * tiling.pitch + j % row;
}

// The fragments and words of a class, or this block's part of them.
__device__ void prepare_class(const Preparation& p, const ClassTile& tile, int32_t klass, int32_t part) {
  const Tiling& tiling = p.tiling;
  int64_t entries = 1;  // of a head's table
#pragma unroll
  for (int a = 0; a < kAxes; ++a) entries *= 2 * tiling.axis[a].axis.kernel_size - 1;
  const int32_t count = static_cast<int32_t>(p.heads) * tiling.pairs * kPairFloat4, cols1 = tile.span[1].cols,
                cols2 = tile.span[2].cols;
#pragma unroll 1
  for (int32_t i = part * kPrepareThreads + static_cast<int32_t>(threadIdx.x); i < count; i += p.parts * kPrepareThreads) {
    const int32_t lane = i % 32, half = i / 32 % 2, pair = i / kPairFloat4 % tiling.pairs,
                  head = i / kPairFloat4 / tiling.pairs;
    const int32_t row = lane / 4, j = pair * kPairColumns + half * 8 + lane % 4 * 2;
    const int32_t left[kAxes] = {j / cols2 / cols1, j / cols2 % cols1, j % cols2};
    const int32_t next = j + 1, right[kAxes] = {next / cols2 / cols1, next / cols2 % cols1, next % cols2};
    const float* table = p.rpb ? p.rpb + head * entries : nullptr;
    const int64_t owner = (int64_t{head} * tiling.classes + klass) * tiling.pairs + pair;
    p.fragments[owner * kPairFloat4 + half * 32 + lane] = {
        fragment_value(p, tile, table, row, left), fragment_value(p, tile, table, row, right),
        fragment_value(p, tile, table, row + 8, left), fragment_value(p, tile, table, row + 8, right)};
    if (head == 0 && half == 0) {
      const int32_t first = pair * kPairColumns;
      p.columns[(int64_t{klass} * tiling.pairs + pair) * 32 + lane] =
          column_position(tiling, tile, first + straight_column(lane)) |
          column_position(tiling, tile, first + transposed_column(lane)) << 16;
    }
  }
}

// span[a][which][tile] and, behind all spans, halo[a][which][cta]
__device__ void prepare_span(const Preparation& p, int64_t index) {
#pragma unroll 1
  for (int a = 0; a < kAxes; ++a) {
    const AxisTiling& axis = p.tiling.axis[a];
    const auto tile = static_cast<int32_t>(index - p.tiling.span_base[a]);
    if (0 <= tile && tile < axis.lengths * axis.tiles[0]) {
      TileSpan span = axis.span_of(tile / axis.tiles[0], tile % axis.tiles[0]);
      for (int32_t r = 0; r < kTileRows; ++r) span.there |= static_cast<uint32_t>(axis.step_of(r) < span.rows) << r;
      p.spans[index] = span;
    }
    const auto cta = static_cast<int32_t>(index - p.tiling.spans - p.tiling.halo_base[a]);
    if (0 <= cta && cta < axis.lengths * axis.ctas) {
      p.halos[index - p.tiling.spans] = axis.halo_of(cta / axis.ctas, cta % axis.ctas);
    }
  }
}

__global__ void prepare_kernel(const __grid_constant__ Preparation p) {
  const auto block = static_cast<int32_t>(blockIdx.x), of_classes = p.tiling.classes * p.parts;
  if (block < of_classes) {
    ClassTile& tile = *shared_memory<ClassTile>();
    const int32_t klass = block / p.parts;
    if (tile.describe(p.tiling, klass)) prepare_class(p, tile, klass, block % p.parts);
  } else {
    prepare_span(p, static_cast<int64_t>(block - of_classes) * kPrepareThreads + static_cast<int32_t>(threadIdx.x));
  }
}

}  // namespace natrpb::cuda::mma
