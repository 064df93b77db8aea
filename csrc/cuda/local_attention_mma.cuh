// What the tensor-core kernels of local attention share: where a CTA and a warp are, how columns are staged in shared memory,
// and how rows travel between global memory and fragments.
//
// A warp owns a tile of 16 rows (tiling.h) and takes the columns that any of them sees, packed densely, 16 at a time. The
// accumulator of a score product starts from a fragment that prepare_kernel has laid out: bias / scale, or -inf where the row
// does not see the column, in the order in which lanes hold an accumulator. So no kernel here knows masks, edges, windows or
// tables: a score is one product, and exp2(score * scale * log2 e - ...) is 0 wherever it must be.
//
// NB: 0 * NaN is NaN, so a non-finite column would leak into rows of the tile that do not see it. It then shows in their
// results, and the warp forms the tile's rows again, one by one, from the columns that each sees (local_attention_rows.cuh).
#pragma once

#include <cmath>

#include "cuda/local_attention_rows.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tiling.h"

namespace natrpb::cuda::mma {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr int kPairFloat4 = 2 * 32;  // float4 of a pair's fragment: two n-tiles, 32 lanes

// Blocks of the two backward kernels that share a multiprocessor, at widths up to 32: as many as registers allow without spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr int kBackwardBlocks = 2;
#else
inline constexpr int kBackwardBlocks = 3;
#endif

struct Params {
  LocalAttentionParams op;
  Tiling tiling;
  const TileSpan* spans = nullptr;    // [tiling.spans]
  const HaloSpan* halos = nullptr;    // [tiling.halos]
  const float4* fragments = nullptr;  // [h or 1, classes, pairs, 2, 32]
  const uint32_t* columns = nullptr;  // [classes, pairs, 32]: where a lane's columns lie, see Columns
  int64_t fragments_per_head = 0;     // float4 between two heads; 0 without a bias
  View stats;                         // strides of lse and delta, contiguous [B, h, *]; backward only, as all below
  float* lse = nullptr;               // [B, h, *] in units of log 2
  float* delta = nullptr;             // [B, h, *]: <dout, out> - dlse
  float* partials = nullptr;          // [h, runs, warps, entries]: drpb of every warp, or nullptr
  float4* sums = nullptr;             // [h, runs, warps, pairs, 2, 32]: sums of dscores, or nullptr: in shared memory
  bool sums_in_registers = false;     // while items are of one class
  int32_t runs = 0;                   // CTAs of one head in the query pass
  int32_t entries = 0;                // of a head's bias table
};

// Quotients by a divisor that is not known at compile time; exact while x * divisor < 2^32.
struct Divider {
  uint32_t magic = 0;  // 0: the divisor is 1

  __device__ explicit Divider(int32_t divisor) : magic(divisor > 1 ? 0xffffffffu / static_cast<uint32_t>(divisor) + 1 : 0) {}
  __device__ int32_t operator()(int32_t x) const {
    return magic == 0 ? x : static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * magic >> 32);
  }
};

// Where a CTA works: batch entry, head, and on every axis the residue group, the CTA's number in it and its halo. It lies at the
// start of shared memory, since registers are what these kernels are short of.
struct alignas(128) Place {
  int32_t batch, head;
  int32_t group[kAxes], cta[kAxes], which[kAxes];
  HaloSpan halo[kAxes];

  // `index` numbers the CTAs of one batch entry and head: group and number on axis 0, then on axis 1, then on axis 2. The first
  // lanes of one warp call it together, each for an axis of its own.
  __device__ void find(const Params& p, int32_t batch_, int32_t head_, uint32_t index) {
    const int32_t a = threadIdx.x % 32;
    if (a >= kAxes) return;
    for (int32_t b = kAxes - 1; b > a; --b) index /= static_cast<uint32_t>(p.tiling.axis[b].ctas * p.tiling.axis[b].groups());
    const AxisTiling& axis = p.tiling.axis[a];
    const uint32_t ctas = static_cast<uint32_t>(axis.ctas);
    index %= ctas * static_cast<uint32_t>(axis.groups());
    cta[a] = static_cast<int32_t>(index % ctas);
    group[a] = static_cast<int32_t>(index / ctas);
    which[a] = axis.length_of(group[a]);
    halo[a] = p.halos[p.tiling.halo_base[a] + which[a] * axis.ctas + cta[a]];
    if (a != 0) return;
    batch = batch_;
    head = head_;
  }

  // In-group index to position on axis a.
  __device__ int32_t position(const Params& p, int a, int32_t i) const {
    return static_cast<int32_t>(p.op.axis[a].dilation) * i + group[a];
  }
  // Element offset of in-group indices in a view.
  __device__ int64_t offset(const Params& p, const View& view, const int32_t (&i)[kAxes]) const {
    int64_t sum = batch * view.batch + head * view.head;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) sum += position(p, a, i[a]) * view.space[a];
    return sum;
  }
};

// A box of columns, numbered densely: j = (i0 * c1 + i1) * c2 + i2.
struct Box {
  int32_t origin[kAxes];
  int32_t count, plane, row;  // columns in all, of a plane, of a row
  Divider by_plane, by_row;

  __device__ Box(const int32_t (&origin_)[kAxes], int32_t c0, int32_t c1, int32_t c2)
      : origin{origin_[0], origin_[1], origin_[2]},
        count(c0 * c1 * c2),
        plane(c1 * c2),
        row(c2),
        by_plane(plane),
        by_row(row) {}

  // In-group indices of column j.
  __device__ void unravel(int32_t j, int32_t (&i)[kAxes]) const {
    const int32_t i0 = by_plane(j);
    const int32_t rest = j - i0 * plane;
    const int32_t i1 = by_row(rest);
    i[0] = origin[0] + i0;
    i[1] = origin[1] + i1;
    i[2] = origin[2] + rest - i1 * row;
  }
};

// A warp's tile, in shared memory too.
struct Tile {
  TileSpan span[kAxes];

  // The first lanes of the warp call it together, each for an axis of its own. `number` counts the CTA's tiles.
  __device__ void find(const Params& p, const Place& place, int32_t number) {
    const int32_t a = threadIdx.x % 32;
    if (a >= kAxes) return;
    uint32_t rest = static_cast<uint32_t>(number);
    for (int32_t b = kAxes - 1; b > a; --b) rest /= static_cast<uint32_t>(p.tiling.axis[b].cta_tiles);
    const AxisTiling& axis = p.tiling.axis[a];
    const int32_t count = axis.cta_tiles;
    const int32_t t = place.cta[a] * count + static_cast<int32_t>(rest % static_cast<uint32_t>(count));
    span[a].rows = 0;
    if (t < axis.tiles[0]) span[a] = p.spans[p.tiling.span_base[a] + place.which[a] * axis.tiles[0] + t];
  }
  __device__ bool exists() const { return span[0].rows > 0 && span[1].rows > 0 && span[2].rows > 0; }
  __device__ int32_t klass(const Params& p) const {
    const AxisTiling(&axis)[kAxes] = p.tiling.axis;
    return (span[0].klass * axis[1].classes + span[1].klass) * axis[2].classes + span[2].klass;
  }

  __device__ Box columns() const {
    return Box({span[0].col_first, span[1].col_first, span[2].col_first}, span[0].cols, span[1].cols, span[2].cols);
  }

  // Steps of row r, or of the last row there is, from the tile's first on every axis; returns whether row r is there.
  __device__ bool row(const Params& p, int32_t r, int32_t (&step)[kAxes]) const {
    bool there = true;
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      const int32_t log_tile = p.tiling.axis[a].log_tile;
      step[a] = r & ((1 << log_tile) - 1);
      r >>= log_tile;
      there &= step[a] < span[a].rows;
      step[a] = step[a] < span[a].rows ? step[a] : span[a].rows - 1;
    }
    return there;
  }

  __device__ const float4* fragments(const Params& p, const Place& place) const {
    return p.fragments + place.head * p.fragments_per_head + static_cast<int64_t>(klass(p)) * p.tiling.pairs * kPairFloat4 +
           threadIdx.x % 32;
  }
};

// What a CTA keeps in shared memory before the halo.
struct CtaState {
  Place place;
  Tile tile[kMaxWarps];
  uint32_t bad[kMaxWarps];  // bit n: tile n of the CTA, this warp's, has a result that is not finite

  // Each warp calls it for itself.
  __device__ const Tile& find_tile(const Params& p, int32_t number) {
    Tile& own = tile[threadIdx.x / 32];
    __syncwarp();
    own.find(p, place, number);
    __syncwarp();
    return own;
  }
};

// What a warp of the query pass keeps there besides.
struct WarpState {
  Place place;                 // of an item that is done again
  Tile tile;                   // whose class the sums belong to
  int32_t head, end;           // of the CTA's run of items
  int32_t first_bad, end_bad;  // the items whose results are not finite lie in [first_bad, end_bad)
};

// The two rows of a tile that a lane's accumulators belong to, lane / 4 and lane / 4 + 8.
struct LaneRows {
  int32_t first[kAxes];  // in-group indices of the tile's first row
  int32_t step[2][kAxes];
  bool there[2];

  __device__ LaneRows(const Params& p, const Tile& tile)
      : first{tile.span[0].row_first, tile.span[1].row_first, tile.span[2].row_first} {
    const int32_t g = threadIdx.x % 32 / 4;
    there[0] = tile.row(p, g, step[0]);
    there[1] = tile.row(p, g + 8, step[1]);
  }

  // Element offset of the tile's first row in a view, and of a lane's row from there; the latter fits 32 bits (serves()).
  __device__ int64_t base(const Params& p, const Place& place, const View& view) const { return place.offset(p, view, first); }
  __device__ int32_t offset(const Params& p, const View& view, int half) const {
    int32_t sum = 0;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      sum += step[half][a] * (static_cast<int32_t>(p.op.axis[a].dilation) * static_cast<int32_t>(view.space[a]));
    }
    return sum;
  }
};

// Rows of kDim 16-bit channels in shared memory. Position `at` holds its 16-byte unit u at u ^ swizzle(at): any 8 positions
// that differ mod 8 then have their units u in different banks.
template <int kDim>
struct Staged {
  static constexpr int kUnits = kDim / 8;
  static constexpr int kSwap = kUnits < 8 ? kUnits - 1 : 7;  // largest power of two in kUnits, up to 8
  static constexpr int kShift = kUnits >= 8 ? 0 : kUnits == 4 ? 1 : kUnits == 2 ? 2 : 3;  // log2(8 / kUnits)
  static_assert((kUnits & (kUnits - 1)) == 0);

  __device__ static int32_t offset(int32_t at, int32_t unit) {
    return at * (kDim * 2) + ((unit ^ ((at >> kShift) & kSwap)) << 4);
  }
};

// The 16-byte unit of every column's row that a thread copies, from two tensors, x to `shared`, y behind it.
template <class T, int kDim>
struct Copy {
  const T *from_x, *from_y;
  bool has_x, has_y;
  unsigned char *to_x, *to_y;

  static constexpr int kUnits = Staged<kDim>::kUnits;
  static __device__ int32_t unit() { return threadIdx.x % kUnits; }

  __device__ Copy(const Params& p, const View& x, int64_t x_channels, const View& y, int64_t y_channels, unsigned char* shared)
      : has_x(unit() * 8 < x_channels),
        has_y(unit() * 8 < y_channels),
        to_x(shared),
        to_y(shared + p.tiling.positions * (kDim * 2)) {
    from_x = static_cast<const T*>(x.data) + (has_x ? unit() * 8 : 0);
    from_y = static_cast<const T*>(y.data) + (has_y ? unit() * 8 : 0);
  }
  // x and y: offsets in the tensors.
  __device__ void start(int64_t x, int64_t y, int32_t at) const {
    const int32_t offset = Staged<kDim>::offset(at, unit());
    ptx::cp_async_16(to_x + offset, from_x + x, has_x);
    ptx::cp_async_16(to_y + offset, from_y + y, has_y);
  }
};

// Starts copying the CTA's whole halo; the caller waits and synchronises. Warps take turns at lines of the halo where there are
// enough of them, else all threads at the columns of each.
template <class T, int kDim>
__device__ void stage_halo(const Params& p, const Place& place, const View& x, int64_t x_channels, const View& y,
                           int64_t y_channels, unsigned char* shared) {
  constexpr int kUnits = Staged<kDim>::kUnits;
  const Copy<T, kDim> copy(p, x, x_channels, y, y_channels, shared);
  const int32_t planes = place.halo[0].count, lines = place.halo[1].count, columns = place.halo[2].count;
  const bool by_warp = planes * lines >= p.tiling.warps;
  const int32_t line_step = by_warp ? p.tiling.warps : 1;
  const int32_t column_step = (by_warp ? 32 : blockDim.x) / kUnits;
  const int32_t first_column = (by_warp ? threadIdx.x % 32 : threadIdx.x) / kUnits;
  const Divider by_lines(lines);
  const int32_t first[kAxes] = {place.halo[0].first, place.halo[1].first, place.halo[2].first};
  const int64_t x_first = place.offset(p, x, first), y_first = place.offset(p, y, first);
  const Axis(&axis)[kAxes] = p.op.axis;
  const int64_t x_column = axis[2].dilation * x.space[2], y_column = axis[2].dilation * y.space[2];
  for (int32_t n = by_warp ? threadIdx.x / 32 : 0; n < planes * lines; n += line_step) {
    const int32_t plane = by_lines(n), line = n - plane * lines;
    int64_t x_at = x_first + plane * (axis[0].dilation * x.space[0]) + line * (axis[1].dilation * x.space[1]);
    int64_t y_at = y_first + plane * (axis[0].dilation * y.space[0]) + line * (axis[1].dilation * y.space[1]);
    x_at += first_column * x_column;
    y_at += first_column * y_column;
    int32_t at = plane * p.tiling.plane + line * p.tiling.pitch + first_column;
    for (int32_t column = first_column; column < columns; column += column_step) {
      copy.start(x_at, y_at, at);
      x_at += column_step * x_column;
      y_at += column_step * y_column;
      at += column_step;
    }
  }
  ptx::cp_async_commit();
}

// Copies one chunk of a tile's columns, for tiles whose columns do not fit as a whole. One warp.
template <class T, int kDim>
__device__ void stage_chunk(const Params& p, const Place& place, const Tile& tile, int32_t first_pair, const View& x,
                            int64_t x_channels, const View& y, int64_t y_channels, unsigned char* shared) {
  constexpr int kUnits = Staged<kDim>::kUnits;
  const Copy<T, kDim> copy(p, x, x_channels, y, y_channels, shared);
  const Box box = tile.columns();
  const int32_t begin = first_pair * kPairColumns;
  const int32_t end = static_cast<int32_t>(min_of(begin + kChunkPairs * kPairColumns, box.count));
  __syncwarp();
  for (int32_t j = begin + threadIdx.x / kUnits; j < end; j += 32 / kUnits) {
    int32_t i[kAxes];
    box.unravel(j, i);
    copy.start(place.offset(p, x, i), place.offset(p, y, i), j - begin);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
}

// Finds a tile's columns in shared memory, 16 at a time, for ldmatrix. Straight, columns are the product's n: registers 0, 1 are
// the lower eight's channels 0-7 and 8-15, registers 2, 3 the upper eight's. Transposed, columns are its k: registers 0, 1 are
// channels 0-7 of the lower and the upper eight, registers 2, 3 channels 8-15. Either way a lane gives the address of one row;
// prepare_kernel has laid out the positions of both, relative to the tile's first column, in the halves of a word.
struct Columns {
  const uint32_t* table;  // this lane's, [pairs, 32]
  int32_t base, pairs;

  static __device__ int32_t straight_column(int32_t lane) { return lane / 16 * 8 + lane % 8; }
  static __device__ int32_t transposed_column(int32_t lane) { return lane % 16; }

  __device__ Columns(const Params& p, const Place& place, const Tile& tile)
      : table(p.columns + static_cast<int64_t>(tile.klass(p)) * p.tiling.pairs * 32 + threadIdx.x % 32),
        base(p.tiling.streamed ? 0
                               : (tile.span[0].col_first - place.halo[0].first) * p.tiling.plane +
                                     (tile.span[1].col_first - place.halo[1].first) * p.tiling.pitch + tile.span[2].col_first -
                                     place.halo[2].first),
        pairs((tile.span[0].cols * tile.span[1].cols * tile.span[2].cols + kPairColumns - 1) / kPairColumns) {}

  // Offsets of this lane's rows in shared memory; those of further channels: xor with 32 per 16.
  template <int kDim>
  __device__ void find(int32_t pair, int32_t& straight, int32_t& transposed) const {
    const uint32_t relative = ptx::load_4(table + pair * 32);
    const int32_t lane = threadIdx.x % 32;
    straight = Staged<kDim>::offset(base + static_cast<int32_t>(relative & 0xffff), lane / 8 % 2);
    transposed = Staged<kDim>::offset(base + static_cast<int32_t>(relative >> 16), lane / 16);
  }
};

// s[16 rows, 16 columns] += a[16 rows, kDim] x[16 columns, kDim]^T
template <class T, int kDim>
__device__ void multiply_straight(float (&s)[2][4], const uint32_t (&a)[kDim / 16][4], const unsigned char* x, int32_t offset) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, x + (offset ^ k << 5));
    ptx::mma_16816<T>(s[0], a[k], {b[0], b[1]});
    ptx::mma_16816<T>(s[1], a[k], {b[2], b[3]});
  }
}

// o[16 rows, kDim] += a[16 rows, 16 columns] x[16 columns, kDim]
template <class T, int kDim>
__device__ void multiply_transposed(float (&o)[kDim / 8][4], const uint32_t (&a)[4], const unsigned char* x, int32_t offset) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, x + (offset ^ k << 5));
    ptx::mma_16816<T>(o[2 * k], a, {b[0], b[1]});
    ptx::mma_16816<T>(o[2 * k + 1], a, {b[2], b[3]});
  }
}

// An accumulator of 16 columns, rounded to T, as the A operand of the next product.
template <class T>
__device__ void to_operand(uint32_t (&a)[4], const float (&s)[2][4]) {
  a[0] = ptx::pack<T>(s[0][0], s[0][1]);
  a[1] = ptx::pack<T>(s[0][2], s[0][3]);
  a[2] = ptx::pack<T>(s[1][0], s[1][1]);
  a[3] = ptx::pack<T>(s[1][2], s[1][3]);
}

__device__ __forceinline__ void start_from(float (&s)[2][4], const float4* fragment) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 x = ptx::load_f4(fragment + half * 32);
    s[half][0] = x.x;
    s[half][1] = x.y;
    s[half][2] = x.z;
    s[half][3] = x.w;
  }
}

// A tile's rows as A operands; channels beyond `channels` are zeros.
template <class T, int kDim>
__device__ void load_rows(uint32_t (&a)[kDim / 16][4], const Params& p, const Place& place, const LaneRows& rows,
                          const View& view, int64_t channels) {
  const T* first = static_cast<const T*>(view.data) + rows.base(p, place, view) + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* row = first + rows.offset(p, view, half);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      a[k][half] = 16 * k < channels ? ptx::load_4(row + 16 * k) : 0;
      a[k][half + 2] = 16 * k + 8 < channels ? ptx::load_4(row + 16 * k + 8) : 0;
    }
  }
}

// Rounds factor[row] * o to T and stores the tile's rows that are there. Neighboring lanes exchange halves, so that a quad
// writes 32 bytes of a row at a time.
template <class T, int kDim>
__device__ void store_rows(const float (&o)[kDim / 8][4], const float (&factor)[2], const Params& p, const Place& place,
                           const LaneRows& rows, const View& view, int64_t channels) {
  const int32_t t = threadIdx.x % 4;
  const bool odd = t % 2;
  T* first = static_cast<T*>(view.data) + rows.base(p, place, view);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = first + rows.offset(p, view, half);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const uint32_t lower = ptx::pack<T>(o[2 * k][2 * half] * factor[half], o[2 * k][2 * half + 1] * factor[half]);
      const uint32_t upper = ptx::pack<T>(o[2 * k + 1][2 * half] * factor[half], o[2 * k + 1][2 * half + 1] * factor[half]);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? lower : upper, 1);
      const int32_t channel = 16 * k + (odd ? 8 + 2 * (t - 1) : 2 * t);
      if (rows.there[half] && channel < channels) {
        ptx::store_8(row + channel, odd ? uint2{other, upper} : uint2{lower, other});
      }
    }
  }
}

// Whether any of the tile's rows that are there holds a number that is not finite.
template <int kCount>
__device__ bool any_bad(const float (&o)[kCount][4], const LaneRows& rows) {
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    sum[0] += o[n][0] + o[n][1];
    sum[1] += o[n][2] + o[n][3];
  }
  // NB: written so that NaN counts.
  const bool good = (!rows.there[0] || fabsf(sum[0]) < INFINITY) && (!rows.there[1] || fabsf(sum[1]) < INFINITY);
  return __any_sync(0xffffffffu, !good);
}

// Calls redo(row) for every row of the tile that is there, all lanes together.
template <class Redo>
__device__ void redo_rows(const Params& p, const Place& place, const Tile& tile, Redo redo) {
  for (int32_t r = 0; r < kTileRows; ++r) {
    int32_t step[kAxes];
    if (!tile.row(p, r, step)) continue;
    redo(Row{place.batch,
             place.head,
             {place.position(p, 0, tile.span[0].row_first + step[0]), place.position(p, 1, tile.span[1].row_first + step[1]),
              place.position(p, 2, tile.span[2].row_first + step[2])}});
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace natrpb::cuda::mma
