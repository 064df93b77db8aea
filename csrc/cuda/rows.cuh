// What the plain kernels of local attention are made of. One warp works on one row: a query and the keys that it sees, or a key
// and the queries that see it. The other side of the pair is a box of rows (geometry.h), its members numbered row-major; a warp
// takes them in chunks of 32, one per lane.
//
// Two functions hold all arithmetic on channels. Eight lanes read one member together, so that four members, 128 bytes each,
// come with one load of the warp:
//   dots      <factor * row, member> for the chunk's members; every lane ends with the dot product of its own member
//   add_rows  sum[channel] += weight(member) * member[channel]; a lane holds the channels that it reads, over a quarter of the
//             members, until store_row adds the quarters
// V is the number of elements of one load: kVector<T>, or 1 where a tensor is not aligned to 16 bytes.
//
// All 32 lanes call every function together. Orders of summation are fixed: results are the same bits on every run.
#pragma once

#include <cmath>
#include <limits>

#include "cuda/device.cuh"
#include "cuda/types.cuh"
#include "natrpb/local_attention.h"

namespace natrpb::cuda {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffff;
inline constexpr int kRowLanes = 8;  // lanes that read one member together
inline constexpr int kGroups = kWarp / kRowLanes;
inline constexpr int kSteps = kWarp / kGroups;  // loads that a chunk takes
inline constexpr int kStepsAtOnce = 4;          // whose loads are under way together; all eight would cost too many registers
static_assert(kSteps == kRowLanes, "dots leaves as many members per group of lanes as the group has lanes");

inline constexpr int kSums = 8;                      // that add_rows keeps per lane
inline constexpr int kChannels = kSums * kRowLanes;  // that they cover; a wider row is summed in several parts

template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
inline constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int first_lane_of_group() { return lane_index() / kRowLanes * kRowLanes; }

template <class Acc>
__device__ __forceinline__ Acc warp_sum(Acc x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
// NaN is passed over.
template <class Acc>
__device__ __forceinline__ Acc warp_max(Acc x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = std::fmax(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// ---- rows and boxes ----

// NB: 32 bits each, since registers are scarce; the launchers refuse what does not fit. Offsets in memory have 64.
struct Row {
  int32_t batch, head;
  int32_t position[kAxes];
};

NATRPB_HD int64_t positions_of(const LocalAttentionParams& params) {
  return params.axis[0].length * params.axis[1].length * params.axis[2].length;
}
NATRPB_HD int64_t table_entries(const LocalAttentionParams& params) {
  return (2 * params.axis[0].kernel_size - 1) * (2 * params.axis[1].kernel_size - 1) * (2 * params.axis[2].kernel_size - 1);
}
NATRPB_HD int64_t slots_of(const LocalAttentionParams& params) {
  return params.axis[0].kernel_size * params.axis[1].kernel_size * params.axis[2].kernel_size;
}

// flat = (position[0] * L_1 + position[1]) * L_2 + position[2], of positions or of steps between them
__device__ __forceinline__ int64_t flat_position(const LocalAttentionParams& params, const int32_t (&position)[kAxes]) {
  return (position[0] * params.axis[1].length + position[1]) * params.axis[2].length + position[2];
}
__device__ __forceinline__ Row row_at(const LocalAttentionParams& params, int64_t batch, int64_t head, int64_t flat) {
  const int64_t column = flat % params.axis[2].length, line = flat / params.axis[2].length;
  return {static_cast<int32_t>(batch),
          static_cast<int32_t>(head),
          {static_cast<int32_t>(line / params.axis[1].length), static_cast<int32_t>(line % params.axis[1].length),
           static_cast<int32_t>(column)}};
}

// The rows on the other side of one row's pairs.
struct Box {
  int32_t own[kAxes];    // in-group index of the row itself
  int32_t first[kAxes];  // in-group index of the first member
  int32_t count[kAxes];
  uint32_t members;
  int64_t entry;  // of rpb[head] for the pair of the row and the first member
};

enum class Side { kKeysOfQuery, kQueriesOfKey };

// `position` comes in as the row's and leaves as the first member's.
template <Side kSide>
__device__ __forceinline__ Box box_of(const LocalAttentionParams& params, int32_t (&position)[kAxes]) {
  Box box;
  box.members = 1;
  box.entry = 0;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = params.axis[a];
    if (axis.length == 1) {  // also every missing axis: spares it the divisions
      box.own[a] = box.first[a] = 0;
      box.count[a] = 1;
    } else {
      int64_t group = 0, size = axis.length, own = position[a];
      if (axis.dilation > 1) {
        group = own % axis.dilation;
        size = axis.group_length(group);
        own /= axis.dilation;
      }
      const Interval range = kSide == Side::kKeysOfQuery ? axis.keys(own, size) : axis.queries(own, size);
      box.own[a] = static_cast<int32_t>(own);
      box.first[a] = static_cast<int32_t>(range.first);
      box.count[a] = static_cast<int32_t>(range.count());
      box.members *= static_cast<uint32_t>(range.count());
      position[a] = static_cast<int32_t>(axis.position(group, range.first));
    }
    const bool own_is_query = kSide == Side::kKeysOfQuery;
    const int64_t query = own_is_query ? box.own[a] : box.first[a], key = own_is_query ? box.first[a] : box.own[a];
    box.entry = box.entry * (2 * axis.kernel_size - 1) + axis.bias_index(query, key);
  }
  return box;
}

// A lane's member of a chunk. Lanes past the end of the box stand at its first member and must not use it.
struct Member {
  bool valid;
  uint32_t valid_lanes;
  int32_t at[kAxes];    // in-group steps from the box's first member
  int32_t step[kAxes];  // at * dilation, in positions
};

// at = unravel(index) over extents n
__device__ __forceinline__ void unravel(uint32_t index, const int32_t (&n)[kAxes], int32_t (&at)[kAxes]) {
  const uint32_t columns = static_cast<uint32_t>(n[2]), lines = static_cast<uint32_t>(n[1]);
  const uint32_t line = index / columns;
  at[2] = static_cast<int32_t>(index % columns);
  at[1] = static_cast<int32_t>(line % lines);
  at[0] = static_cast<int32_t>(line / lines);
}

// Lane l holds member kGroups * (l mod 8) + l div 8 of its chunk: step t of all groups reads neighboring members.
__device__ __forceinline__ int member_index() { return lane_index() % kRowLanes * kGroups + lane_index() / kRowLanes; }
// The lane's part of a chunk of `members` members, or of slots, that unravel over `extents`.
__device__ __forceinline__ Member member_at(const LocalAttentionParams& params, const int32_t (&extents)[kAxes],
                                            uint32_t members, uint32_t chunk) {
  const uint32_t index = chunk + member_index();
  Member member;
  member.valid = index < members;
  member.valid_lanes = __ballot_sync(kAllLanes, member.valid);
  unravel(member.valid ? index : 0, extents, member.at);
#pragma unroll
  for (int a = 0; a < kAxes; ++a) member.step[a] = member.at[a] * static_cast<int32_t>(params.axis[a].dilation);
  return member;
}

// Elements in memory from the box's first member to another.
__device__ __forceinline__ int64_t offset_of(const View& view, const Member& member) {
  return member.step[0] * view.space[0] + member.step[1] * view.space[1] + member.step[2] * view.space[2];
}
template <class T>
__device__ __forceinline__ T* row_data(const View& view, const Row& row, const int32_t (&position)[kAxes]) {
  const int64_t at[kAxes] = {position[0], position[1], position[2]};
  return static_cast<T*>(view.data) + view.offset(row.batch, row.head, at);
}
// Entry of rpb[head] for the pair of the row and a member: key minus query, so it falls where members are queries.
template <Side kSide>
__device__ __forceinline__ int64_t bias_entry(const LocalAttentionParams& params, const Box& box, const Member& member) {
  const int64_t line = member.at[0] * (2 * params.axis[1].kernel_size - 1) + member.at[1];
  const int64_t step = line * (2 * params.axis[2].kernel_size - 1) + member.at[2];
  return kSide == Side::kKeysOfQuery ? box.entry + step : box.entry - step;
}
// slot = (at[0] * K_1 + at[1]) * K_2 + at[2], at counted from the query's first key
__device__ __forceinline__ int64_t slot_of(const LocalAttentionParams& params, const int32_t (&at)[kAxes]) {
  return (at[0] * params.axis[1].kernel_size + at[1]) * params.axis[2].kernel_size + at[2];
}

// ---- channels ----

// Adds s[t] over the lanes of a group; lane t of the group ends with the sum of its s[t].
template <class Acc>
__device__ __forceinline__ Acc sum_transposed(Acc (&s)[kSteps]) {
#pragma unroll
  for (int half = kSteps / 2; half > 0; half /= 2) {
    const bool upper = lane_index() & half;
#pragma unroll
    for (int t = 0; t < half; ++t) {
      const Acc kept = upper ? s[t + half] : s[t], sent = upper ? s[t] : s[t + half];
      s[t] = kept + __shfl_xor_sync(kAllLanes, sent, half);
    }
  }
  return s[0];
}

// Whether step t, the members of lanes t, t + 8, t + 16 and t + 24, has any valid one.
__device__ __forceinline__ bool is_step(uint32_t valid_lanes, int t) { return valid_lanes & 0x01010101u << t; }

// <factor * row, rows + offset> of every valid lane's member; 0 for the other lanes, whose rows are not read.
template <int V, class T>
__device__ __forceinline__ Compute<T> dots(Compute<T> factor, const T* row, const T* rows, int64_t offset, uint32_t valid_lanes,
                                           int channels) {
  const int base = first_lane_of_group();
  Compute<T> sum[kSteps] = {};
#pragma unroll
  for (int first = 0; first < kSteps; first += kStepsAtOnce) {
    const T* member[kStepsAtOnce];
#pragma unroll
    for (int t = 0; t < kStepsAtOnce; ++t) {
      if (is_step(valid_lanes, first + t)) member[t] = rows + __shfl_sync(kAllLanes, offset, base + first + t);
    }
#pragma unroll 1
    for (int c = lane_index() % kRowLanes * V; c < channels; c += kRowLanes * V) {
      Compute<T> x[V];
      load<V>(row + c, x);
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] *= factor;
#pragma unroll
      for (int t = 0; t < kStepsAtOnce; ++t) {
        if (!(valid_lanes >> (base + first + t) & 1)) continue;
        Compute<T> y[V];
        load<V>(member[t] + c, y);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[first + t] += x[i] * y[i];
      }
    }
  }
  return sum_transposed(sum);
}

// sum += weight * member over the valid lanes' members; sum[pass * V + i] belongs to channel (pass * 8 + lane mod 8) * V + i.
template <int V, class T>
__device__ __forceinline__ void add_rows(Compute<T> weight, const T* rows, int64_t offset, uint32_t valid_lanes, int channels,
                                         Compute<T> (&sum)[kSums]) {
  const int base = first_lane_of_group();
#pragma unroll
  for (int first = 0; first < kSteps; first += kStepsAtOnce) {
    const T* member[kStepsAtOnce];
    Compute<T> weights[kStepsAtOnce];
#pragma unroll
    for (int t = 0; t < kStepsAtOnce; ++t) {
      if (!is_step(valid_lanes, first + t)) continue;
      member[t] = rows + __shfl_sync(kAllLanes, offset, base + first + t);
      weights[t] = __shfl_sync(kAllLanes, weight, base + first + t);
    }
#pragma unroll
    for (int pass = 0; pass < kSums / V; ++pass) {
      const int c = (pass * kRowLanes + lane_index() % kRowLanes) * V;
      if (c >= channels) break;
#pragma unroll
      for (int t = 0; t < kStepsAtOnce; ++t) {
        if (!(valid_lanes >> (base + first + t) & 1)) continue;
        Compute<T> x[V];
        load<V>(member[t] + c, x);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[pass * V + i] += weights[t] * x[i];
      }
    }
  }
}

// to[channel] = factor * (sum over the groups of lanes)
template <int V, class T>
__device__ __forceinline__ void store_row(const Compute<T> (&sum)[kSums], Compute<T> factor, int channels, T* to) {
#pragma unroll
  for (int pass = 0; pass < kSums / V; ++pass) {
    if (pass * kRowLanes * V >= channels) break;
    Compute<T> x[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i] = sum[pass * V + i];
#pragma unroll
      for (int step = kRowLanes; step < kWarp; step *= 2) x[i] += __shfl_xor_sync(kAllLanes, x[i], step);
      x[i] *= factor;
    }
    const int c = (pass * kRowLanes + lane_index() % kRowLanes) * V;
    if (c < channels && first_lane_of_group() == 0) store<V>(to + c, x);
  }
}

}  // namespace natrpb::cuda
