#include "cuda/tiling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace natrpb::cuda {

namespace {

bool same_structure(const AxisTiling& axis, int which, int32_t a, int32_t b) {
  const int64_t size = axis.length[which];
  const Interval rows_a = axis.rows_of(a, size), rows_b = axis.rows_of(b, size);
  const int64_t count = std::max<int64_t>(rows_a.count(), 0);
  if (count != std::max<int64_t>(rows_b.count(), 0)) return false;
  for (int64_t r = 0; r < count; ++r) {
    const Interval cols_a = axis.cols_of(rows_a.first + r, size), cols_b = axis.cols_of(rows_b.first + r, size);
    if (cols_a.first - rows_a.first != cols_b.first - rows_b.first) return false;
    if (cols_a.last - rows_a.first != cols_b.last - rows_b.first) return false;
  }
  return true;
}

int32_t greatest_common_divisor(int32_t a, int32_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

int32_t count_tiles(const AxisTiling& axis, int64_t size) {
  if (axis.axis.kind == AxisKind::kWindow) {
    const int64_t shift = axis.axis.shift;
    const int64_t windows = (shift > 0) + (size > shift ? ceil_div(size - shift, axis.axis.kernel_size) : 0);
    return static_cast<int32_t>(windows * axis.window_tiles());
  }
  const int64_t ends = axis.end_rows_of(size);
  return static_cast<int32_t>(2 * ceil_div(ends, axis.tile()) + ceil_div(size - 2 * ends, axis.tile()));
}

// Tiles whose structure repeats are a run in the middle, since clamping and ragged ends grow only towards the ends.
void find_classes(AxisTiling& axis, int which) {
  const int32_t tiles = axis.tiles[which];
  const int32_t stride = static_cast<int32_t>(axis.axis.stride);
  const int32_t period =
      axis.axis.kind == AxisKind::kWindow ? axis.window_tiles() : stride / greatest_common_divisor(stride, axis.tile());
  const int32_t middle = (tiles - period) / 2;
  auto regular = [&](int32_t t) {
    const int32_t offset = (t - middle) % period;
    return same_structure(axis, which, t, middle + (offset < 0 ? offset + period : offset));
  };
  axis.head[which] = tiles;
  axis.tail[which] = axis.period[which] = 0;
  if (tiles < period + 2) return;
  // NB: ends reach K + stride rows far, and within that reach a tile may look regular by chance.
  const int32_t reach = static_cast<int32_t>((axis.axis.kernel_size + stride) / axis.tile()) + 2;
  int32_t head = std::min(reach, middle), end = std::max(tiles - reach, middle + period);
  while (head > 0 && regular(head - 1)) --head;
  while (end < tiles && regular(end)) ++end;
  if (end - head <= period) return;
  axis.head[which] = head;
  axis.tail[which] = tiles - end;
  axis.period[which] = period;
}

void cut_axis(AxisTiling& axis, int32_t log_tile) {
  const Axis& a = axis.axis;
  axis.log_tile = log_tile;
  // The K keys at either end see other queries than those between: a tile of both sorts would span more columns.
  if (axis.transposed && a.kind == AxisKind::kNeighborhood) axis.end_rows = static_cast<int32_t>(a.kernel_size);
  axis.length[0] = static_cast<int32_t>(a.group_length(0));
  axis.lengths = a.length > a.dilation && a.length % a.dilation != 0 ? 2 : 1;
  axis.length[1] = static_cast<int32_t>(a.group_length(a.groups() - 1));
  axis.classes = 0;
  axis.cols = 1;
  for (int which = 0; which < axis.lengths; ++which) {
    axis.tiles[which] = count_tiles(axis, axis.length[which]);
    find_classes(axis, which);
    axis.classes += axis.head[which] + axis.period[which] + axis.tail[which];
  }
  axis.usual_cols = axis.span_of(0, axis.tiles[0] / 2).cols;
  for (int32_t c = 0; c < axis.classes; ++c) {
    const AxisTiling::Member member = axis.member_of(c);
    if (member.tile >= 0) axis.cols = std::max(axis.cols, axis.span_of(member.which, member.tile).cols);
  }
}

// Groups CTAs of `cta_tiles` tiles and finds the widest halo; all structures show within `reach` CTAs of either end.
void group_axis(AxisTiling& axis, int32_t cta_tiles) {
  axis.cta_tiles = cta_tiles;
  axis.ctas = static_cast<int32_t>(ceil_div(axis.tiles[0], cta_tiles));
  axis.halo = 1;
  for (int which = 0; which < axis.lengths; ++which) {
    const int32_t ends = std::max(axis.head[which], axis.tail[which]) + 2 * axis.period[which];
    const int32_t reach = ends / cta_tiles + 2;
    for (int32_t cta = 0; cta < axis.ctas; ++cta) {
      if (cta == reach && axis.ctas - reach > cta) cta = axis.ctas - reach;
      axis.halo = std::max(axis.halo, axis.halo_of(which, cta).count);
    }
  }
}

// Columns that tiles of `rows` rows see in the middle of an axis.
int64_t interior_cols(const Axis& axis, int64_t rows) {
  if (axis.kind == AxisKind::kWindow) return std::min(axis.kernel_size, axis.group_length(0));
  return std::min(rows + axis.kernel_size - 1, axis.group_length(0));
}

// The shape of a tile: the one with the fewest products over the whole map.
void choose_tile(const LocalAttentionParams& params, int32_t (&log_tile)[kAxes]) {
  int64_t best = INT64_MAX, least_columns = INT64_MAX;
  for (int32_t i = 0; i <= 4; ++i) {
    for (int32_t j = 0; i + j <= 4; ++j) {
      const int32_t logs[kAxes] = {i, j, 4 - i - j};
      int64_t tiles = 1, columns = 1;
      for (int a = 0; a < kAxes; ++a) {
        const Axis& axis = params.axis[a];
        const int64_t rows = int64_t{1} << logs[a];
        const int64_t length = axis.group_length(0);
        const int64_t extent = axis.kind == AxisKind::kWindow ? std::min(axis.kernel_size, length) : length;
        tiles *= ceil_div(extent, rows);
        columns *= interior_cols(axis, rows);
      }
      const int64_t cost = tiles * (ceil_div(columns, kPairColumns) + 1);  // a tile's own cost is about that of a pair
      if (cost < best || (cost == best && columns < least_columns)) {
        best = cost;
        least_columns = columns;
        std::copy(logs, logs + kAxes, log_tile);
      }
    }
  }
}

// Pads the halo so that columns which follow each other in a tile lie in different banks: their positions differ mod 8.
void lay_out(Tiling& tiling) {
  auto congruent = [](int32_t least, int32_t residue) { return least + ((residue - least) % 8 + 8) % 8; };
  const AxisTiling* axis = tiling.axis;
  tiling.pitch = congruent(axis[2].halo, axis[2].usual_cols);
  tiling.plane = axis[0].halo == 1 ? axis[1].halo * tiling.pitch
                                   : congruent(axis[1].halo * tiling.pitch, axis[1].usual_cols * axis[2].usual_cols);
  tiling.positions = (axis[0].halo - 1) * tiling.plane + (axis[1].halo - 1) * tiling.pitch + axis[2].halo;
}

// Shared memory beside the halo.
int64_t other_bytes(const Tiling& tiling, const TilingLimits& limits, int64_t warps) {
  return limits.bytes_per_cta + warps * (limits.bytes_per_warp + tiling.pairs * limits.bytes_per_pair);
}

// What a choice of CTAs costs, up to a factor: traffic, made worse by multiprocessors or warps without work.
double cost_of_ctas(const Tiling& tiling, const LocalAttentionParams& params, int row_bytes, const TilingLimits& limits,
                    const int32_t (&counts)[kAxes]) {
  constexpr double kNever = 1e300;
  constexpr double kPadding = 1.15;    // positions of the halo's layout that hold no column
  constexpr double kEnoughCtas = 2;    // for every multiprocessor, so that none idles long
  constexpr double kEnoughWarps = 8;   // on a multiprocessor, to hide latencies
  constexpr double kSetup = 0.5;       // work of a CTA beside its tiles, in tiles per warp
  constexpr int64_t kReserved = 1024;  // bytes of shared memory that the system takes for a CTA
  double ctas = static_cast<double>(params.batch * params.heads), halo = 1.0;
  for (int a = 0; a < kAxes; ++a) {
    const AxisTiling& axis = tiling.axis[a];
    const bool window = axis.axis.kind == AxisKind::kWindow;
    const int32_t unit = window ? axis.window_tiles() : 1;
    if (counts[a] > axis.tiles[0] || (unit % counts[a] != 0 && counts[a] % unit != 0)) return kNever;
    ctas *= static_cast<double>(ceil_div(axis.tiles[0], counts[a])) * axis.groups();
    const int64_t columns = window ? ceil_div(counts[a], unit) * interior_cols(axis.axis, 1)
                                   : std::min<int64_t>(axis.cols + (counts[a] - 1) * axis.tile(), axis.length[0]);
    halo *= static_cast<double>(columns);
  }
  const int64_t tiles = int64_t{counts[0]} * counts[1] * counts[2], warps = std::min<int64_t>(tiles, kMaxWarps);
  const int64_t bytes = static_cast<int64_t>(halo * kPadding * row_bytes) + other_bytes(tiling, limits, warps);
  if (bytes > limits.block_bytes) return kNever;
  const int64_t together = std::min(limits.multiprocessor_bytes / (bytes + kReserved), limits.multiprocessor_warps / warps);
  const double warps_together = static_cast<double>(std::max<int64_t>(together, 1) * warps);
  const double idle = std::max(1.0, kEnoughCtas * limits.multiprocessors / ctas) * std::max(1.0, kEnoughWarps / warps_together);
  const double rounds = static_cast<double>(ceil_div(tiles, warps));
  const double work = (rounds + kSetup) * static_cast<double>(warps) / static_cast<double>(tiles);  // per tile
  return ctas * halo * idle * (0.5 + 0.5 * work);
}

void choose_ctas(Tiling& tiling, const LocalAttentionParams& params, int row_bytes, const TilingLimits& limits) {
  constexpr int32_t kCounts[] = {1, 2, 3, 4, 6, 8, 12, 16};
  double best = INFINITY;
  int32_t chosen[kAxes] = {1, 1, 1};
  for (int32_t i : kCounts) {
    for (int32_t j : kCounts) {
      for (int32_t k : kCounts) {
        if (i * j * k > limits.most_tiles) break;
        const double cost = cost_of_ctas(tiling, params, row_bytes, limits, {i, j, k});
        if (cost < best) {
          best = cost;
          chosen[0] = i;
          chosen[1] = j;
          chosen[2] = k;
        }
      }
    }
  }
  for (int a = 0; a < kAxes; ++a) group_axis(tiling.axis[a], chosen[a]);
  lay_out(tiling);
}

Tiling cut(const LocalAttentionParams& params, bool transposed, int channels, const TilingLimits& limits) {
  Tiling tiling;
  tiling.transposed = transposed;
  int32_t log_tile[kAxes];
  choose_tile(params, log_tile);
  int64_t cols = 1;
  int32_t row_shift = 0;
  tiling.classes = 1;
  for (int a = kAxes - 1; a >= 0; --a) {
    AxisTiling& axis = tiling.axis[a];
    axis.axis = params.axis[a];
    axis.transposed = transposed;
    axis.row_shift = row_shift;
    row_shift += log_tile[a];
    cut_axis(axis, log_tile[a]);
    cols *= axis.cols;
    tiling.classes *= axis.classes;
  }
  tiling.pairs = static_cast<int32_t>(ceil_div(cols, kPairColumns));
  constexpr int kTensors = 2, kElementBytes = 2;
  const int row_bytes = kTensors * kElementBytes * channels;
  choose_ctas(tiling, params, row_bytes, limits);
  tiling.cta_tiles = tiling.axis[0].cta_tiles * tiling.axis[1].cta_tiles * tiling.axis[2].cta_tiles;
  tiling.warps = std::min(tiling.cta_tiles, kMaxWarps);
  tiling.streamed = int64_t{tiling.positions} * row_bytes + other_bytes(tiling, limits, tiling.warps) > limits.block_bytes;
  if (tiling.streamed) {
    for (AxisTiling& axis : tiling.axis) group_axis(axis, 1);
    tiling.cta_tiles = tiling.warps = 1;
    tiling.positions = kChunkPairs * kPairColumns;
  }
  for (int a = 0; a < kAxes; ++a) {
    const AxisTiling& axis = tiling.axis[a];
    tiling.span_base[a] = tiling.spans;
    tiling.halo_base[a] = tiling.halos;
    tiling.spans += axis.lengths * axis.tiles[0];
    tiling.halos += axis.lengths * axis.ctas;
    tiling.ctas *= static_cast<int64_t>(axis.ctas) * axis.groups();
  }
  return tiling;
}

// All that a tiling depends on.
typedef std::array<int64_t, 6 * kAxes + 12> Key;
Key key_of(const LocalAttentionParams& params, bool transposed, int channels, const TilingLimits& limits) {
  Key key{params.batch,
          params.heads,
          transposed,
          channels,
          limits.block_bytes,
          limits.multiprocessor_bytes,
          limits.multiprocessor_warps,
          limits.multiprocessors,
          limits.most_tiles,
          limits.bytes_per_cta,
          limits.bytes_per_warp,
          limits.bytes_per_pair};
  int64_t* next = key.data() + 12;
  for (const Axis& axis : params.axis) {
    for (int64_t number : {axis.length, axis.kernel_size, axis.stride, axis.dilation, axis.shift}) *next++ = number;
    *next++ = static_cast<int64_t>(axis.kind);
  }
  return key;
}

struct KeptTiling {
  Key key;
  Tiling tiling;
};

}  // namespace

// NB: one takes 1 to 7 us. An op asks for its few ones again and again, and a model for those of its layers.
Tiling make_tiling(const LocalAttentionParams& params, bool transposed, int channels, const TilingLimits& limits) {
  constexpr size_t kMostKept = 64;
  static thread_local std::vector<KeptTiling> kept;
  static thread_local size_t oldest = 0;
  const Key key = key_of(params, transposed, channels, limits);
  for (const KeptTiling& one : kept) {
    if (one.key == key) return one.tiling;
  }
  const KeptTiling made{key, cut(params, transposed, channels, limits)};
  if (kept.size() < kMostKept) {
    kept.push_back(made);
  } else {
    kept[oldest] = made;
    oldest = (oldest + 1) % kMostKept;
  }
  return made.tiling;
}

}  // namespace natrpb::cuda
