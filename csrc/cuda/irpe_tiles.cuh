// What the attention kernels of irpe are made of. A block holds kTile rows of its own, kRows per warp, and goes through the rows
// on the other side of their pairs, the members, kWarp at a time. Both sides are staged in shared memory, kSlice channels at once:
// members in the storage type, own rows in the compute type.
//
//   multiply       lanes are members: every lane reads its member once for the warp's rows, which are broadcast
//   add_weighted   lanes are channels: weights are broadcast
//
// Rows that do not exist, or that a mask excludes for all, are staged as zeros and not read.
#pragma once

#include "cuda/rows.cuh"
#include "natrpb/irpe.h"

namespace natrpb::cuda::irpe {

inline constexpr int kWarps = 4;  // of a block
inline constexpr int kThreads = kWarps * kWarp;
inline constexpr int kRows = 8;  // own rows of a warp
inline constexpr int kTile = kWarps * kRows;
inline constexpr int kSlice = 64;
inline constexpr int kLaneChannels = kSlice / kWarp;
inline constexpr int kRowThreads = kThreads / kWarp;  // that stage one row
static_assert(kTile == kWarp, "own rows and members are staged alike");

// Pitches: 16 bytes more than whole rows of banks, so that eight lanes that read one column of eight rows meet no conflict.
template <class E>
inline constexpr int kPitch = kSlice + 16 / sizeof(E);
inline constexpr int kPairPitch = kWarp + 4;  // of numbers per pair, [kRows][kPairPitch]; the same for 4-byte columns of 8 rows

template <class Acc>
inline constexpr int kWide = 16 / sizeof(Acc);

// Shared memory of a block; bins [kWarps][bins][kWarp] come behind it.
template <class T, int kOwnTiles>
struct alignas(16) Shared {
  using Acc = Compute<T>;
  // What the block works on. NB: not in registers, where everything that follows from it would stay, too, and spill.
  int64_t item;  // batch * tiles + tile, of the head
  int32_t sweep, batch, head, first_row;

  alignas(16) T members[2][kWarp * kPitch<T>];            // of both products
  alignas(16) Acc own[kOwnTiles][kTile * kPitch<Acc>];    // likewise
  alignas(16) Acc weights[kWarps][kRows * kPairPitch];    // of the warps' pairs
  alignas(16) int32_t index[kWarps][kRows * kPairPitch];  // of the warps' pairs

  __device__ Acc* bins() { return reinterpret_cast<Acc*>(this + 1); }
};

// Neighboring rows of one (batch, head).
template <class T>
struct RowRange {
  const T* data = nullptr;
  int64_t step = 0;                 // elements from row to row
  int count = 0;                    // rows that exist
  const uint8_t* closed = nullptr;  // [count], 1 where a row counts as zeros; may be nullptr
};

// Up to 16 bytes of elements, zeros behind the first `count`.
template <class T>
__device__ __forceinline__ uint4 gather_unit(const T* from, int count) {
  T x[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (i < count) {
      x[i] = from[i];
    } else {
      round_to(Compute<T>(0), x[i]);
    }
  }
  uint4 bits;
  memcpy(&bits, static_cast<const void*>(x), sizeof bits);
  return bits;
}

template <class T>
__device__ __forceinline__ void widen_unit(const uint4& bits, Compute<T> (&x)[kVector<T>]) {
  T stored[kVector<T>];
  memcpy(static_cast<void*>(stored), &bits, sizeof bits);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) x[i] = widen(stored[i]);
}
template <class Acc>
__device__ __forceinline__ void load_wide(const Acc* shared, Acc (&x)[kWide<Acc>]) {
  const uint4 bits = ptx::load_shared_16(shared);
  memcpy(x, &bits, sizeof bits);
}

// f(row, channel, 16 bytes of it) for this thread's part of channels first .. first + count - 1 of up to kTile rows; with
// `vectors` all rows start at multiples of 16 bytes and hold whole units of them.
template <class T, class F>
__device__ __forceinline__ void each_unit(const RowRange<T>& rows, int64_t first, int count, bool vectors, F&& f) {
  const int r = static_cast<int>(threadIdx.x) / kRowThreads;
  const bool there = r < rows.count && !(rows.closed && rows.closed[r]);
  const T* from = rows.data + r * rows.step + first;
  int c = static_cast<int>(threadIdx.x) % kRowThreads * kVector<T>;
  if (vectors) {
#pragma unroll 2
    for (; c < count; c += kRowThreads * kVector<T>) f(r, c, there ? ptx::load_16_cached(from + c) : uint4{0, 0, 0, 0});
  } else {
#pragma unroll 1
    for (; c < count; c += kRowThreads * kVector<T>) f(r, c, gather_unit(from + c, there ? count - c : 0));
  }
}
// tile[row][c] = factor * row[first + c]
template <class T>
__device__ __forceinline__ void stage_own(const RowRange<T>& rows, int64_t first, int count, bool vectors, Compute<T> factor,
                                          Compute<T>* tile) {
  each_unit(rows, first, count, vectors, [&](int r, int c, const uint4& bits) {
    Compute<T> x[kVector<T>];
    widen_unit<T>(bits, x);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) tile[r * kPitch<Compute<T>> + c + i] = factor * x[i];
  });
}
// tile[row][c] = row[first + c]
template <class T>
__device__ __forceinline__ void stage_members(const RowRange<T>& rows, int64_t first, int count, bool vectors, T* tile) {
  each_unit(rows, first, count, vectors,
            [&](int r, int c, const uint4& bits) { *reinterpret_cast<uint4*>(tile + r * kPitch<T> + c) = bits; });
}

// s[r] += <row r of the warp, the lane's member> over `count` staged channels
template <class T>
__device__ __forceinline__ void multiply(const Compute<T>* own_tile, const T* member_tile, int count, Compute<T> (&s)[kRows]) {
  using Acc = Compute<T>;
  const Acc* own = own_tile + static_cast<int>(threadIdx.x) / kWarp * kRows * kPitch<Acc>;
  const T* member = member_tile + lane_index() * kPitch<T>;
#pragma unroll 1
  for (int c = 0; c < count; c += kVector<T>) {
    Acc y[kVector<T>];
    widen_unit<T>(ptx::load_shared_16(member + c), y);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int part = 0; part < kVector<T>; part += kWide<Acc>) {
        Acc x[kWide<Acc>];
        load_wide(own + r * kPitch<Acc> + c + part, x);
#pragma unroll
        for (int i = 0; i < kWide<Acc>; ++i) s[r] += x[i] * y[part + i];
      }
    }
  }
}

template <class T>
struct alignas(kLaneChannels * sizeof(T)) LaneChannels {
  T x[kLaneChannels];
};

// sum[r][i] += weights[r][k] * member k's staged channel (kLaneChannels * lane + i); weights [kRows][kPairPitch]
template <class T>
__device__ __forceinline__ void add_weighted(const Compute<T>* weights, const T* member_tile, int members,
                                             Compute<T> (&sum)[kRows][kLaneChannels]) {
  using Acc = Compute<T>;
#pragma unroll 1
  for (int k = 0; k < members; k += kWide<Acc>) {
    Acc y[kWide<Acc>][kLaneChannels];
#pragma unroll
    for (int i = 0; i < kWide<Acc>; ++i) {
      const T* member = member_tile + (k + i) * kPitch<T> + lane_index() * kLaneChannels;
      const LaneChannels<T> stored = *reinterpret_cast<const LaneChannels<T>*>(member);
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) y[i][c] = widen(stored.x[c]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Acc w[kWide<Acc>];
      load_wide(weights + r * kPairPitch + k, w);
#pragma unroll
      for (int i = 0; i < kWide<Acc>; ++i) {
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) sum[r][c] += w[i] * y[i][c];
      }
    }
  }
}

// to[r][kLaneChannels * lane + i] = factor * sum[r][i] for the rows that exist and channels below `width`
template <class T>
__device__ __forceinline__ void store_rows(const Compute<T> (&sum)[kRows][kLaneChannels], Compute<T> factor, int rows, T* to,
                                           int64_t step, int width) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int c = lane_index() * kLaneChannels + i;
      if (r < rows && c < width) round_to(factor * sum[r][i], to[r * step + c]);
    }
  }
}

// ---- sums by bucket ----
//
// A warp's bins [buckets][kWarp]: lane 4 r + g adds the members g, g + 4, ... of row r in its own column, a bank of its own, so that
// no two additions ever meet and their order is fixed.
inline constexpr int kBinLanes = kWarp / kRows;

// The part of all buckets, of one or two maps one behind the other, that a sweep sums.
struct BinRange {
  int64_t first = 0;
  int count = 0;

  __device__ int below(int64_t end) const { return static_cast<int>(max_of(min_of(end - first, count), 0)); }
};

template <class Acc>
__device__ __forceinline__ void clear_bins(Acc* bins, int count) {
  for (int c = 0; c < count; ++c) bins[c * kWarp + lane_index()] = 0;
}

// x[r] for a row that differs from lane to lane.
template <class Acc>
__device__ __forceinline__ Acc pick(const Acc (&x)[kRows], int row) {
  Acc picked = x[0];
#pragma unroll
  for (int r = 1; r < kRows; ++r) picked = row == r ? x[r] : picked;
  return picked;
}

// to[row of the warp][first + c] = factor * (sum of the row's bins c) for c < count; factor is that of the lane's row
template <class T>
__device__ __forceinline__ void store_bins(const Compute<T>* bins, int count, Compute<T> factor, int rows, T* to,
                                           int64_t step) {
  static_assert(kBinLanes == 4);
  const int g = lane_index() % kBinLanes, row = lane_index() / kBinLanes;
  for (int c = 0; c < count; c += kBinLanes) {
    Compute<T> x[kBinLanes];
#pragma unroll
    for (int i = 0; i < kBinLanes; ++i) x[i] = c + i < count ? bins[(c + i) * kWarp + lane_index()] : 0;
    // Lane g ends with the sum of x[g] over the row's lanes.
#pragma unroll
    for (int half = kBinLanes / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const bool upper = g & half;
        const Compute<T> kept = upper ? x[i + half] : x[i], sent = upper ? x[i] : x[i + half];
        x[i] = kept + __shfl_xor_sync(kAllLanes, sent, half);
      }
    }
    if (c + g < count && row < rows) round_to(factor * x[0], to[row * step + c + g]);
  }
}

}  // namespace natrpb::cuda::irpe
