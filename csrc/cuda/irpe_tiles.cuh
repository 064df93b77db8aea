// What the attention kernels of irpe are made of. A block holds kTile rows of its own, kRows per warp, and goes through the rows
// on the other side of their pairs, the members, kWarp at a time. Both sides are staged in shared memory, kSlice channels at once;
// irpe_products.cuh multiplies them. Rows that do not exist, or that a mask excludes for all, are staged as zeros and not read.
#pragma once

#include "cuda/rows.cuh"
#include "natrpb/irpe.h"

namespace natrpb::cuda::irpe {

inline constexpr int kWarps = 4;  // of a block
inline constexpr int kThreads = kWarps * kWarp;
inline constexpr int kRows = 8;  // own rows of a warp
inline constexpr int kTile = kWarps * kRows;
inline constexpr int kSlice = 64;
inline constexpr int kRowThreads = kThreads / kWarp;  // that stage one row
static_assert(kTile == kWarp, "own rows and members are staged alike");

// Pitches: 16 bytes more than whole rows of banks, so that eight lanes that read one column of eight rows meet no conflict.
template <class E>
inline constexpr int kPitch = kSlice + 16 / sizeof(E);
inline constexpr int kPairPitch = kWarp + 4;  // of numbers per pair, [kRows][kPairPitch]; the same for 4-byte columns of 8 rows

// Shared memory of a block; bins [kWarps][bins][kWarp] come behind it. Own rows are staged as Own, members as they are.
template <class T, class Own, int kOwnTiles>
struct alignas(16) Shared {
  using Acc = Compute<T>;
  // What the block works on. NB: not in registers, where everything that follows from it would stay, too, and spill.
  int64_t item;  // batch * tiles + tile, of the head
  int32_t sweep, batch, head, first_row;

  alignas(16) T members[2][kWarp * kPitch<T>];            // of both products
  alignas(16) Own own[kOwnTiles][kTile * kPitch<Own>];    // likewise
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

// Channels are staged in whole steps of a product, zeros behind the last one.
inline constexpr int kChannelStep = 16;

// tile[row][c] = row[first + c] for this thread's part of up to kTile rows and `count` channels; with `vectors` all rows start at
// multiples of 16 bytes and hold whole units of them. E is T, or what it widens to.
template <class E, class T>
__device__ __forceinline__ void stage_rows(const RowRange<T>& rows, int64_t first, int count, bool vectors, E* tile) {
  const int r = static_cast<int>(threadIdx.x) / kRowThreads;
  const bool there = r < rows.count && !(rows.closed && rows.closed[r]);
  const T* from = rows.data + r * rows.step + first;
  E* to = tile + r * kPitch<E>;
  const auto put = [&](int c, const uint4& bits) {
    if constexpr (std::is_same_v<E, T>) {
      *reinterpret_cast<uint4*>(to + c) = bits;
    } else {
      Compute<T> x[kVector<T>];
      widen_unit<T>(bits, x);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) to[c + i] = x[i];
    }
  };
  const int end = (count + kChannelStep - 1) / kChannelStep * kChannelStep;
  int c = static_cast<int>(threadIdx.x) % kRowThreads * kVector<T>;
  if (vectors) {
#pragma unroll 2
    for (; c < end; c += kRowThreads * kVector<T>) {
      put(c, there && c < count ? ptx::load_16(from + c) : uint4{0, 0, 0, 0});
    }
  } else {
#pragma unroll 1
    for (; c < end; c += kRowThreads * kVector<T>) put(c, gather_unit(from + c, there ? count - c : 0));
  }
}

// x[r] for a row that may differ from lane to lane.
template <class Acc>
__device__ __forceinline__ Acc pick(const Acc (&x)[kRows], int row) {
  Acc picked = x[0];
#pragma unroll
  for (int r = 1; r < kRows; ++r) picked = row == r ? x[r] : picked;
  return picked;
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
