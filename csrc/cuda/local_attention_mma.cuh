// What the tensor-core kernels of local attention share: where a CTA and a warp are, and how rows travel between global memory
// and fragments. How columns travel: local_attention_mma_columns.cuh.
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

// Whether the forward has a body of its own for full chunks of columns, which takes registers that these GPUs' code has not left.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr bool kFullChunks = false;
#else
inline constexpr bool kFullChunks = true;
#endif

// A tensor by the bytes between its neighbors.
struct Strides {
  int64_t batch, head;
  int64_t group[kAxes];  // between positions that follow each other, hence between residue groups
  int64_t step[kAxes];   // between in-group indices
  int64_t eight;         // between rows r and r + 8 of a tile
};
struct Tensor {
  unsigned char* data = nullptr;
  Strides bytes{};
};

// Where Params::tensor holds what. The first two are the columns', staged in shared memory.
namespace forward_tensor {
enum : int { kKey, kValue, kQuery, kOut, kLse, kCount };
}
namespace query_tensor {
enum : int { kKey, kValue, kQuery, kDout, kOut, kLse, kDlse, kDquery, kStats, kCount };
}
namespace key_tensor {
enum : int { kQuery, kDout, kKey, kValue, kDkey, kDvalue, kStats, kCount };
}
inline constexpr int kMostTensors = query_tensor::kCount;

struct Params {
  LocalAttentionParams op;
  Tiling tiling;
  Tensor tensor[kMostTensors];
  const TileSpan* spans = nullptr;    // [tiling.spans]
  const HaloSpan* halos = nullptr;    // [tiling.halos]
  const float4* fragments = nullptr;  // [h or 1, classes, pairs, 2, 32]
  const uint32_t* columns = nullptr;  // [classes, pairs, 32]: where a lane's columns lie, see Columns
  int64_t fragments_per_head = 0;     // float4 between two heads; 0 without a bias
  float2* stats = nullptr;            // [B, h, *]: lse in units of log 2, <dout, out> - dlse; backward only, as all below
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

// A warp's tile.
struct alignas(16) Tile {
  int32_t row_first[kAxes];  // in-group indices, as all positions on an axis here
  uint32_t there;            // bit r: row r is there
  int32_t col_first[kAxes];
  int32_t base;  // position of the first column in shared memory
  int32_t cols[kAxes];
  int32_t pairs;
  int32_t first_pair;  // of its class, in the tables of fragments and columns

  // `number` counts the CTA's tiles. One thread.
  __device__ void find(const Params& p, const Place& place, int32_t number) {
    uint32_t rest = static_cast<uint32_t>(number);
    int32_t count = 1, klass = 0, classes = 1;
    const int32_t pitch[kAxes] = {p.tiling.plane, p.tiling.pitch, 1};
    there = ~0u;
    base = 0;
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      const AxisTiling& axis = p.tiling.axis[a];
      const uint32_t tiles = static_cast<uint32_t>(axis.cta_tiles);
      const int32_t t = place.cta[a] * axis.cta_tiles + static_cast<int32_t>(rest % tiles);
      rest /= tiles;
      TileSpan span{};
      if (t < axis.tiles[0]) span = p.spans[p.tiling.span_base[a] + place.which[a] * axis.tiles[0] + t];
      row_first[a] = span.row_first;
      col_first[a] = span.col_first;
      cols[a] = span.cols;
      there &= span.there;
      count *= span.cols;
      klass += span.klass * classes;
      classes *= axis.classes;
      if (!p.tiling.streamed) base += (span.col_first - place.halo[a].first) * pitch[a];
    }
    pairs = (count + kPairColumns - 1) / kPairColumns;
    first_pair = klass * p.tiling.pairs;
  }
  __device__ bool exists() const { return there != 0; }
  __device__ bool has(int32_t r) const { return there >> r & 1; }
  __device__ Box columns() const { return Box(col_first, cols[0], cols[1], cols[2]); }
};

// What a CTA keeps in shared memory before the halo. Found once by a few threads: 64-bit products and quotients by numbers that
// are not known at compile time would otherwise cost each warp more than a tile's products.
struct CtaState {
  Place place;
  unsigned char* base[kMostTensors];  // of in-group index 0 on every axis
  const float4* fragments;            // the head's
  Tile tile[kMaxCtaTiles];
  uint32_t bad[kMaxWarps];  // bit n: tile n of the CTA, this warp's, has a result that is not finite

  // After the place is found, one warp.
  __device__ void find_bases(const Params& p, int32_t count) {
    const int32_t n = threadIdx.x % 32;
    if (n == 0) fragments = p.fragments + place.head * p.fragments_per_head;
    if (n >= count) return;
    const Strides& bytes = p.tensor[n].bytes;
    unsigned char* at = p.tensor[n].data + place.batch * bytes.batch + place.head * bytes.head;
    for (int a = 0; a < kAxes; ++a) at += place.group[a] * bytes.group[a];
    base[n] = at;
  }
  // This lane's, of a tile.
  __device__ const float4* fragments_of(const Tile& tile) const {
    return fragments + int64_t{tile.first_pair} * kPairFloat4 + threadIdx.x % 32;
  }
  // Row at in-group indices of a tensor.
  __device__ unsigned char* at(const Params& p, int tensor, const int32_t (&i)[kAxes]) const {
    unsigned char* sum = base[tensor];
#pragma unroll
    for (int a = 0; a < kAxes; ++a) sum += static_cast<uint32_t>(i[a]) * p.tensor[tensor].bytes.step[a];
    return sum;
  }
};

// What a warp of the query pass keeps there besides.
struct WarpState {
  Place place;                 // of an item that is done again
  Tile tile;                   // whose class the sums belong to
  int32_t head, end;           // of the CTA's run of items
  int32_t first_bad, end_bad;  // the items whose results are not finite lie in [first_bad, end_bad)
};

// The two rows of a tile that a lane's accumulators belong to, lane / 4 and lane / 4 + 8. Pointers to rows that are not there
// may point anywhere.
struct LaneRows {
  int32_t index[kAxes];  // in-group, of the first
  bool there[2];

  __device__ LaneRows(const Params& p, const Tile& tile) {
    const int32_t r = threadIdx.x % 32 / 4;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) index[a] = tile.row_first[a] + p.tiling.axis[a].step_of(r);
    there[0] = tile.has(r);
    there[1] = tile.has(r + 8);
  }

  // Element `channel` of both rows of a tensor.
  template <class T>
  __device__ void find(const Params& p, const CtaState& cta, int tensor, int32_t channel, T* (&row)[2]) const {
    unsigned char* first = cta.at(p, tensor, index) + channel * static_cast<int32_t>(sizeof(T));
    row[0] = reinterpret_cast<T*>(first);
    row[1] = reinterpret_cast<T*>(first + p.tensor[tensor].bytes.eight);
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

// A tile's rows as A operands; channels beyond `channels` and rows that are not there are zeros.
template <class T, int kDim>
__device__ void load_rows(uint32_t (&a)[kDim / 16][4], const Params& p, const CtaState& cta, const LaneRows& rows, int tensor,
                          int64_t channels) {
  const T* row[2];
  rows.find(p, cta, tensor, threadIdx.x % 4 * 2, row);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t end = rows.there[half] ? static_cast<int32_t>(channels) : 0;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      a[k][half] = ptx::load_4(row[half] + 16 * k, 16 * k < end);
      a[k][half + 2] = ptx::load_4(row[half] + 16 * k + 8, 16 * k + 8 < end);
    }
  }
}

// Rounds factor[row] * o to T and stores the tile's rows that are there. Neighboring lanes exchange halves, so that a quad
// writes 32 bytes of a row at a time.
template <class T, int kDim>
__device__ void store_rows(const float (&o)[kDim / 8][4], const float (&factor)[2], const Params& p, const CtaState& cta,
                           const LaneRows& rows, int tensor, int64_t channels) {
  const int32_t t = threadIdx.x % 4;
  const bool odd = t % 2;
  const int32_t channel = odd ? 8 + 2 * (t - 1) : 2 * t;
  T* row[2];
  rows.find(p, cta, tensor, channel, row);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t end = rows.there[half] ? static_cast<int32_t>(channels) - channel : 0;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const uint32_t lower = ptx::pack<T>(o[2 * k][2 * half] * factor[half], o[2 * k][2 * half + 1] * factor[half]);
      const uint32_t upper = ptx::pack<T>(o[2 * k + 1][2 * half] * factor[half], o[2 * k + 1][2 * half + 1] * factor[half]);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? lower : upper, 1);
      if (16 * k < end) ptx::store_8(row[half] + 16 * k, odd ? uint2{other, upper} : uint2{lower, other});
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
    if (!tile.has(r)) continue;
    Row row{place.batch, place.head, {}};
#pragma unroll
    for (int a = 0; a < kAxes; ++a) row.position[a] = place.position(p, a, tile.row_first[a] + p.tiling.axis[a].step_of(r));
    redo(row);
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
