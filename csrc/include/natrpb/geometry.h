// The geometry of local attention, once: which keys a query sees, which queries see a key, and which entry of a bias table
// belongs to the pair. Free of torch and of CUDA headers; usable from host and device code.
//
// Every axis stands alone. With dilation d, position i belongs to residue group g = i mod d and has in-group index
// p = i div d; a group of an axis of length L holds Lg = ceil((L - g) / d) positions. Attention never leaves a group, so
// everything below speaks of in-group indices; `Axis::position` leads back.
//
//   neighborhood  K keys from clamp(leader - K/2, 0, Lg - K),  leader = min((p/s)*s + s/2, Lg - 1)
//   causal        max(leader - K + 1, 0) .. p,                 leader = min((p/s)*s + s - 1, Lg - 1)
//   window        max(b*K + shift, 0) .. min((b+1)*K + shift, Lg) - 1,   b = floor((p - shift) / K)
//
// with kernel size K and stride s (1 <= s <= K). First and last key both grow with p, hence the inverse is an interval too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NATRPB_HD __host__ __device__ __forceinline__
#else
#define NATRPB_HD inline
#endif

namespace natrpb {

enum class AxisKind : int32_t { kNeighborhood = 0, kCausal = 1, kWindow = 2 };

// A closed interval of in-group indices; empty where first > last.
struct Interval {
  int64_t first;
  int64_t last;

  NATRPB_HD int64_t count() const { return last - first + 1; }
  NATRPB_HD bool contains(int64_t p) const { return first <= p && p <= last; }
};

NATRPB_HD int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
NATRPB_HD int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
NATRPB_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }                       // a >= 0, b > 0
NATRPB_HD int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }  // b > 0

struct Axis {
  int64_t length = 1;
  int64_t kernel_size = 1;
  int64_t stride = 1;
  int64_t dilation = 1;
  int64_t shift = 0;  // windows only, 0 <= shift < kernel_size
  AxisKind kind = AxisKind::kNeighborhood;

  NATRPB_HD int64_t groups() const { return min_of(dilation, length); }
  NATRPB_HD int64_t group_length(int64_t group) const { return (length - group + dilation - 1) / dilation; }
  NATRPB_HD int64_t position(int64_t group, int64_t p) const { return p * dilation + group; }

  // Keys of query p in a group of `size` positions.
  NATRPB_HD Interval keys(int64_t p, int64_t size) const {
    const int64_t group_of_strides = stride == 1 ? p : p / stride * stride;  // NB: GPUs divide 64 bits in some hundred steps
    if (kind == AxisKind::kNeighborhood) {
      const int64_t leader = min_of(group_of_strides + stride / 2, size - 1);
      const int64_t first = min_of(max_of(leader - kernel_size / 2, 0), size - kernel_size);
      return {first, first + kernel_size - 1};
    }
    if (kind == AxisKind::kCausal) {
      const int64_t leader = min_of(group_of_strides + stride - 1, size - 1);
      return {max_of(leader - kernel_size + 1, 0), p};
    }
    return window(p, size);
  }

  // Queries that see key k: the inverse of `keys`.
  NATRPB_HD Interval queries(int64_t k, int64_t size) const {
    if (kind == AxisKind::kNeighborhood) {
      // keys(p).first <= k  <=>  k >= size - K  or  leader(p) <= k + K/2
      // keys(p).last  >= k  <=>  k <= K - 1     or  leader(p) >= k - K + 1 + K/2
      const int64_t reach = k + kernel_size / 2 - stride / 2;
      if (stride == 1) {
        const int64_t last = k >= size - kernel_size ? size - 1 : min_of(reach, size - 1);
        return {min_of(k < kernel_size ? 0 : reach - kernel_size + 1, size - 1), last};
      }
      const int64_t last = k >= size - kernel_size ? size - 1 : min_of((reach / stride + 1) * stride, size) - 1;
      const int64_t first = k < kernel_size ? 0 : ceil_div(max_of(reach - kernel_size + 1, 0), stride) * stride;
      return {min_of(first, (size - 1) / stride * stride), last};
    }
    if (kind == AxisKind::kCausal) {
      // keys(p).first <= k  <=>  leader(p) <= k + K - 1
      const int64_t reach = k + kernel_size - 1;
      const int64_t last = reach >= size - 1 ? size - 1 : min_of((reach + 1) / stride * stride, size) - 1;
      return {k, last};
    }
    return window(k, size);
  }

  // Index into a bias table's axis of 2K - 1 entries, key minus query; in range for every pair that `keys` allows.
  NATRPB_HD int64_t bias_index(int64_t p, int64_t k) const { return k - p + kernel_size - 1; }

 private:
  NATRPB_HD Interval window(int64_t p, int64_t size) const {
    const int64_t begin = floor_div(p - shift, kernel_size) * kernel_size + shift;
    return {max_of(begin, 0), min_of(begin + kernel_size, size) - 1};
  }
};

}  // namespace natrpb
