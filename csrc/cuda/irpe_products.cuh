// Products of staged tiles (irpe_tiles.cuh), by one warp for its kRows rows: on plain cores for fp32 and fp64, on tensor cores
// for 16-bit types.
//
//   Own        what own rows are staged as
//   multiply   s[r] += <row r, the lane's member> over the staged channels
//   Sum        results [kRows][kSlice], spread over the lanes
//   add        sum[r] += the members' sum of x[r] * member, x[r] being the lane's member's; 16-bit types round x
//   scale      sum[r] *= factor(r);  r may differ from lane to lane
//   store      to[r * step + channel] = sum[r] for rows that exist and channels below width
//
// weights and index are the warp's scratch memory, [kRows][kPairPitch] each. All lanes call the functions together; orders of
// summation are fixed.
#pragma once

#include "cuda/irpe_tiles.cuh"

namespace natrpb::cuda::irpe {

// Lanes are members in `multiply`, neighboring channels in `add`; the other factor is broadcast.
template <class T>
struct PlainProducts {
  using Acc = Compute<T>;
  using Own = Acc;
  static constexpr int kWide = 16 / sizeof(Acc);
  static constexpr int kLaneChannels = kSlice / kWarp;

  struct Sum {
    Acc x[kRows][kLaneChannels];
  };

  static __device__ __forceinline__ void load_wide(const Acc* shared, Acc (&x)[kWide]) {
    const uint4 bits = ptx::load_shared_16(shared);
    memcpy(x, &bits, sizeof bits);
  }

  static __device__ __forceinline__ void multiply(const Own* own, const T* members, int channels, Acc* /*weights*/,
                                                  Acc (&s)[kRows]) {
    const T* member = members + lane_index() * kPitch<T>;
#pragma unroll 1
    for (int c = 0; c < channels; c += kVector<T>) {
      Acc y[kVector<T>];
      widen_unit<T>(ptx::load_shared_16(member + c), y);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Acc x[kWide];
        load_wide(own + r * kPitch<Own> + c, x);
#pragma unroll
        for (int i = 0; i < kWide; ++i) s[r] += x[i] * y[i];
      }
    }
  }

  static __device__ __forceinline__ void add(const Acc (&x)[kRows], Acc* weights, int32_t* /*index*/, const T* members,
                                             int count, int /*width*/, Sum& sum) {
    struct alignas(kLaneChannels * sizeof(T)) Channels {
      T x[kLaneChannels];
    };
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) weights[r * kPairPitch + lane_index()] = x[r];
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < count; k += kWide) {
      Channels y[kWide];
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        y[i] = *reinterpret_cast<const Channels*>(members + (k + i) * kPitch<T> + lane_index() * kLaneChannels);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Acc w[kWide];
        load_wide(weights + r * kPairPitch + k, w);
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
#pragma unroll
          for (int c = 0; c < kLaneChannels; ++c) sum.x[r][c] += w[i] * y[i].x[c];
        }
      }
    }
  }

  template <class F>
  static __device__ __forceinline__ void scale(F&& factor, Sum& sum) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Acc by = factor(r);
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) sum.x[r][i] *= by;
    }
  }

  static __device__ __forceinline__ void store(const Sum& sum, int rows, int width, T* to, int64_t step) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        const int c = lane_index() * kLaneChannels + i;
        if (r < rows && c < width) round_to(sum.x[r][i], to[r * step + c]);
      }
    }
  }
};

// Own rows are the columns of B: scores of 16 members by 8 rows per mma, results of 16 channels by 8 rows.
template <class T>
struct MatrixProducts {
  using Own = T;
  static constexpr int kStep = 16;  // rows of A and depth of an mma
  static constexpr int kSteps = kSlice / kStep;
  static constexpr int kNarrowPitch = kWarp + 8;  // of x as 16-bit numbers: eight rows lie in different banks
  static_assert(kRows == 8 && kWarp == 2 * kStep && kStep == kChannelStep);
  static_assert(kNarrowPitch * sizeof(T) <= kPairPitch * sizeof(int32_t), "they take the place of indices");

  // sum[channel kStep m + g or + 8][row 2 t, 2 t + 1], as an accumulator holds them (ptx.cuh)
  struct Sum {
    float c[kSteps][4];
  };
  static __device__ int g() { return lane_index() / 4; }
  static __device__ int t() { return lane_index() % 4; }
  // The lane's address for matrices 0, 1, .. one below the other, or side by side, or four in a square.
  static __device__ int down() { return lane_index() % 16; }
  static __device__ int right() { return lane_index() / 16 * 8; }
  static __device__ int square_down() { return lane_index() / 16 * 8 + lane_index() % 8; }
  static __device__ int square_right() { return lane_index() / 8 % 2 * 8; }

  static __device__ __forceinline__ void multiply(const Own* own, const T* members, int channels, float* weights,
                                                  float (&s)[kRows]) {
    float c[2][4] = {};
#pragma unroll
    for (int k = 0; k < kSlice; k += kStep) {
      if (k >= channels) break;
      uint32_t b[2];
      ptx::ldmatrix_x2(b, own + lane_index() % 8 * kPitch<T> + k + square_right());
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, members + (m * kStep + down()) * kPitch<T> + k + right());
        ptx::mma_16816<T>(c[m], a, b);
      }
    }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[(2 * t() + i % 2) * kPairPitch + m * kStep + i / 2 * 8 + g()] = c[m][i];
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) s[r] += weights[r * kPairPitch + lane_index()];
  }

  static __device__ __forceinline__ void add(const float (&x)[kRows], float* /*weights*/, int32_t* index, const T* members,
                                             int count, int width, Sum& sum) {
    T* narrow = reinterpret_cast<T*>(index);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) round_to(x[r], narrow[r * kNarrowPitch + lane_index()]);
    __syncwarp();
    uint32_t b[4];
    ptx::ldmatrix_x4(b, narrow + lane_index() % 8 * kNarrowPitch + lane_index() / 8 * 8);
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      if (m * kStep >= width) break;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (k * kStep >= count) break;
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, members + (k * kStep + square_down()) * kPitch<T> + m * kStep + square_right());
        const uint32_t part[2] = {b[2 * k], b[2 * k + 1]};
        ptx::mma_16816<T>(sum.c[m], a, part);
      }
    }
  }

  template <class F>
  static __device__ __forceinline__ void scale(F&& factor, Sum& sum) {
    const float even = factor(2 * t()), odd = factor(2 * t() + 1);
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.c[m][i] *= i % 2 ? odd : even;
    }
  }

  static __device__ __forceinline__ void store(const Sum& sum, int rows, int width, T* to, int64_t step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * t() + i % 2;
      T* from_row = to + row * step;
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
        const int c = m * kStep + i / 2 * 8 + g();
        if (row < rows && c < width) round_to(sum.c[m][i], from_row[c]);
      }
    }
  }
};

template <class T>
using Products = std::conditional_t<sizeof(T) == 2, MatrixProducts<T>, PlainProducts<T>>;

}  // namespace natrpb::cuda::irpe
