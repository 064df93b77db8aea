// How the tensor-core kernels cut local attention into tiles: a warp owns 16 rows, a small box of the map, and sees the
// columns of all of them, another box, packed densely into products of 16 columns.
//
// Rows are queries and columns keys, or, transposed, rows are keys and columns the queries that see them. Every axis stands
// alone, and within an axis every residue group of the dilation; groups have one or two lengths. A tile's class is what its
// mask and bias depend on: two tiles of one class differ by a translation only. Tiles near the ends of an axis have classes of
// their own, those between repeat with a period (of the stride, or of the tiles of a window).
#pragma once

#include <cstdint>

#include "natrpb/local_attention.h"

namespace natrpb::cuda {

inline constexpr int kTileRows = 16;     // rows of one tensor-core product
inline constexpr int kPairColumns = 16;  // columns of a pair of n-tiles: what P V takes at once
inline constexpr int kChunkPairs = 7;    // pairs whose scores a warp holds in registers: K = 7 in 2-D has 100 columns
inline constexpr int kMaxWarps = 4;      // of a CTA
inline constexpr int kMaxCtaTiles = 16;  // warp tiles that share one halo

// A warp tile on one axis, in in-group indices.
struct alignas(16) TileSpan {
  int32_t row_first, rows;  // rows == 0: no such tile in this group
  int32_t col_first, cols;
  int32_t klass;
  uint32_t there;  // bit r: row r of the 16 is one of these, as far as this axis goes; prepare_kernel fills it in
  int32_t unused[2];
};

// The columns that a CTA's tiles see on one axis.
struct HaloSpan {
  int32_t first, count;
};

struct AxisTiling {
  Axis axis;
  bool transposed = false;
  int32_t log_tile = 0;   // a tile has 2^log_tile rows
  int32_t row_shift = 0;  // its row r is step_of(r) rows from its first on this axis
  int32_t end_rows = 0;   // rows at either end that are tiled by themselves; 0: none
  int32_t lengths = 1;    // distinct group lengths, the longer first
  int32_t length[2] = {1, 1};
  int32_t tiles[2] = {1, 1};
  int32_t head[2] = {1, 1};  // tiles at the start with a class of their own
  int32_t tail[2] = {0, 0};  // tiles at the end with a class of their own
  int32_t period[2] = {0, 0};
  int32_t classes = 1;     // over both lengths
  int32_t cols = 1;        // of the widest tile
  int32_t usual_cols = 1;  // of a tile in the middle
  int32_t cta_tiles = 1;   // warp tiles of a CTA
  int32_t ctas = 1;        // CTAs per group
  int32_t halo = 1;        // columns of the widest CTA

  NATRPB_HD int32_t tile() const { return 1 << log_tile; }
  NATRPB_HD int64_t tiles_of(int64_t rows) const { return (rows + tile() - 1) >> log_tile; }
  NATRPB_HD int32_t step_of(int32_t r) const { return r >> row_shift & (tile() - 1); }
  NATRPB_HD int32_t groups() const { return static_cast<int32_t>(axis.groups()); }
  // Which of the two lengths a group has.
  NATRPB_HD int32_t length_of(int32_t group) const { return lengths == 2 && group >= axis.length % axis.dilation ? 1 : 0; }
  NATRPB_HD int32_t first_class(int32_t which) const { return which == 0 ? 0 : head[0] + period[0] + tail[0]; }

  // Tiles of a window: no tile crosses the border of one.
  NATRPB_HD int32_t window_tiles() const { return static_cast<int32_t>(tiles_of(axis.kernel_size)); }
  // The rows at the ends of a group of `size`; none where they would overlap.
  NATRPB_HD int64_t end_rows_of(int64_t size) const { return size >= 2 * end_rows ? end_rows : 0; }

  NATRPB_HD Interval rows_of(int32_t t, int64_t size) const {
    if (axis.kind == AxisKind::kWindow) {
      const int64_t window = int64_t{t / window_tiles()} - (axis.shift > 0);
      const int64_t begin = window * axis.kernel_size + axis.shift;
      const int64_t first = max_of(begin, 0) + t % window_tiles() * tile();
      return {first, min_of(min_of(first + tile(), begin + axis.kernel_size), size) - 1};
    }
    // [0, ends), [ends, size - ends) and [size - ends, size), each cut from its start
    const int64_t ends = end_rows_of(size), end_tiles = tiles_of(ends), middle_tiles = tiles_of(size - 2 * ends);
    int64_t begin = 0, end = ends;
    if (t >= end_tiles + middle_tiles) {
      begin = size - ends;
      end = size;
      t -= static_cast<int32_t>(end_tiles + middle_tiles);
    } else if (t >= end_tiles) {
      begin = ends;
      end = size - ends;
      t -= static_cast<int32_t>(end_tiles);
    }
    const int64_t first = begin + int64_t{t} * tile();
    return {first, min_of(first + tile(), end) - 1};
  }

  // Columns that one row sees.
  NATRPB_HD Interval cols_of(int64_t row, int64_t size) const {
    return transposed ? axis.queries(row, size) : axis.keys(row, size);
  }

  NATRPB_HD int32_t class_of(int32_t which, int32_t t) const {
    const int32_t from_end = t - (tiles[which] - tail[which]);
    int32_t c = t;
    if (from_end >= 0) {
      c = head[which] + period[which] + from_end;
    } else if (t >= head[which]) {
      c = head[which] + t % period[which];
    }
    return first_class(which) + c;
  }

  // A tile of the class, and which length it belongs to; tile < 0 where the class has no member.
  struct Member {
    int32_t which, tile;
  };
  NATRPB_HD Member member_of(int32_t klass) const {
    const int32_t which = klass >= first_class(1) ? 1 : 0;
    const int32_t c = klass - first_class(which);
    if (c < head[which]) return {which, c};
    if (c >= head[which] + period[which]) return {which, tiles[which] - tail[which] + c - head[which] - period[which]};
    const int32_t residue = c - head[which];
    const int32_t ahead = (residue + period[which] - head[which] % period[which]) % period[which];
    const int32_t t = head[which] + ahead;
    return {which, t < tiles[which] - tail[which] ? t : -1};
  }

  NATRPB_HD TileSpan span_of(int32_t which, int32_t t) const {
    if (t >= tiles[which]) return {};
    const Interval rows = rows_of(t, length[which]);
    if (rows.count() <= 0) return {};
    const int64_t first = cols_of(rows.first, length[which]).first;
    const int64_t last = cols_of(rows.last, length[which]).last;
    return {static_cast<int32_t>(rows.first),
            static_cast<int32_t>(rows.count()),
            static_cast<int32_t>(first),
            static_cast<int32_t>(last - first + 1),
            class_of(which, t),
            0,
            {}};
  }

  NATRPB_HD HaloSpan halo_of(int32_t which, int32_t cta) const {
    const int32_t begin = cta * cta_tiles, end = begin + cta_tiles;
    TileSpan first = span_of(which, begin), last = span_of(which, end - 1);
    for (int32_t t = begin + 1; t < end && first.rows == 0; ++t) first = span_of(which, t);
    for (int32_t t = end - 2; t >= begin && last.rows == 0; --t) last = span_of(which, t);
    return {first.col_first, last.col_first + last.cols - first.col_first};
  }
};

struct Tiling {
  AxisTiling axis[kAxes];
  bool transposed = false;
  bool streamed = false;        // columns pass through shared memory in chunks, because a tile's own do not fit
  bool sums_in_shared = false;  // query pass: whether the sums of dscores have room in shared memory
  int32_t warps = 1;            // of a CTA
  int32_t cta_tiles = 1;        // warp tiles of a CTA
  int32_t pairs = 1;            // pairs of n-tiles of the largest tile
  int32_t classes = 1;          // over all axes
  int32_t pitch = 1;            // halo position = (i0 * plane_rows + i1) * pitch + i2, see `plane`
  int32_t plane = 1;
  int32_t positions = 1;  // of the halo, per staged tensor
  int64_t ctas = 1;       // per batch entry and head

  // Tables in the workspace: spans and halos of axis a begin at these entries, one row per length.
  int32_t span_base[kAxes] = {0, 0, 0};
  int32_t halo_base[kAxes] = {0, 0, 0};
  int32_t spans = 0;
  int32_t halos = 0;

  NATRPB_HD int64_t fragments(int64_t heads) const { return heads * classes * pairs * 64; }  // float4 each
  NATRPB_HD int64_t column_words() const { return int64_t{classes} * pairs * 32; }
};

// What CTAs may take.
struct TilingLimits {
  int64_t block_bytes = 0;           // shared memory of a CTA
  int64_t multiprocessor_bytes = 0;  // shared memory of all CTAs that run together
  int32_t multiprocessor_warps = 1;  // warps that registers allow to run together
  int32_t multiprocessors = 1;       // of the device
  int32_t most_tiles = 1;            // warp tiles of a CTA
  int64_t bytes_per_cta = 0;         // shared memory beside the halo: once,
  int64_t bytes_per_warp = 0;        // for every warp,
  int64_t bytes_per_pair = 0;        // and for every warp and pair of n-tiles
};

// Cuts the op. `channels` is the width of a row in shared memory, where two tensors of 16-bit numbers are staged.
Tiling make_tiling(const LocalAttentionParams& params, bool transposed, int channels, const TilingLimits& limits);

}  // namespace natrpb::cuda
