// The unfused products of local attention, one warp per row. T slots per query, row-major over the kernel; a slot past the end
// of a query's interval holds no key: local_qk writes `fill` there, nobody reads it.
//
//   local_qk             attn[i,t] = scale <query_i, key_j(i,t)> + rpb[j - i + K - 1]
//   local_av             out_i = sum_t attn[i,t] value_j(i,t)
//   local_av_transposed  dvalue_j = sum attn[i,t] dout_i  over the pairs (i,t) with j(i,t) = j
//   local_bias_grad      drpb[r] = sum attn[i,t]  over the pairs with j(i,t) - i + K - 1 = r
//
// Bytes: attn once, T elements per query; rows of keys, values and dout mostly from L1 and L2, as in the fused kernels. A warp
// reads and writes attn 32 neighboring slots at a time, but for local_av_transposed, whose weights lie one per query.
#pragma once

#include "cuda/rows.cuh"

namespace natrpb::cuda {

// attn of one query, all slots.
template <class T, int V>
__device__ __forceinline__ void qk_row(const LocalAttentionParams& params, const Row& row) {
  using Acc = Compute<T>;
  const int head_dim = static_cast<int>(params.head_dim);
  int32_t first[kAxes] = {row.position[0], row.position[1], row.position[2]};
  const Box keys = box_of<Side::kKeysOfQuery>(params, first);
  const T* query = row_data<const T>(params.query, row, row.position);
  const T* key = row_data<const T>(params.key, row, first);
  T* attn = row_data<T>(params.attn, row, row.position);
  const Acc* bias = static_cast<const Acc*>(params.rpb);
  if (bias) bias += row.head * table_entries(params);
  const int32_t kernel_size[kAxes] = {static_cast<int32_t>(params.axis[0].kernel_size),
                                      static_cast<int32_t>(params.axis[1].kernel_size),
                                      static_cast<int32_t>(params.axis[2].kernel_size)};
  const uint32_t slots = static_cast<uint32_t>(slots_of(params));
  for (uint32_t chunk = 0; chunk < slots; chunk += kWarp) {
    Member member = member_at(params, kernel_size, slots, chunk);
    const bool is_slot = member.valid;
    for (int a = 0; a < kAxes; ++a) member.valid = member.valid && member.at[a] < keys.count[a];
    member.valid_lanes = __ballot_sync(kAllLanes, member.valid);
    const int64_t offset = offset_of(params.key, member);
    Acc score = dots<V>(static_cast<Acc>(params.scale), query, key, offset, member.valid_lanes, head_dim);
    if (bias && member.valid) score += bias[bias_entry<Side::kKeysOfQuery>(params, keys, member)];
    if (is_slot) round_to(member.valid ? score : static_cast<Acc>(params.fill), attn[slot_of(params, member.at)]);
  }
}

// out of one query.
template <class T, int V>
__device__ __forceinline__ void av_row(const LocalAttentionParams& params, const Row& row) {
  using Acc = Compute<T>;
  const int value_dim = static_cast<int>(params.value_dim);
  int32_t first[kAxes] = {row.position[0], row.position[1], row.position[2]};
  const Box keys = box_of<Side::kKeysOfQuery>(params, first);
  const T* attn = row_data<const T>(params.attn, row, row.position);
  const T* value = row_data<const T>(params.value, row, first);
  T* out = row_data<T>(params.out, row, row.position);
  for (int part = 0; part < value_dim; part += kChannels) {
    Acc sum[kSums] = {};
    for (uint32_t chunk = 0; chunk < keys.members; chunk += kWarp) {
      const Member member = member_at(params, keys.count, keys.members, chunk);
      const Acc weight = member.valid ? widen(attn[slot_of(params, member.at)]) : Acc(0);
      add_rows<V>(weight, value + part, offset_of(params.value, member), member.valid_lanes, value_dim - part, sum);
    }
    store_row<V>(sum, Acc(1), value_dim - part, out + part);
  }
}

// Slot of the row, a key, in the slots of the query that is the lane's member.
__device__ __forceinline__ int64_t slot_at_query(const LocalAttentionParams& params, const Row& key, const Box& queries,
                                                 const Member& member) {
  int32_t at[kAxes];
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = params.axis[a];
    const int64_t size = axis.group_length(key.position[a] % axis.dilation);
    at[a] = static_cast<int32_t>(queries.own[a] - axis.keys(queries.first[a] + member.at[a], size).first);
  }
  return slot_of(params, at);
}

// dvalue of one key.
template <class T, int V>
__device__ __forceinline__ void av_transposed_row(const LocalAttentionParams& params, const Row& row) {
  using Acc = Compute<T>;
  const int value_dim = static_cast<int>(params.value_dim);
  int32_t first[kAxes] = {row.position[0], row.position[1], row.position[2]};
  const Box queries = box_of<Side::kQueriesOfKey>(params, first);
  const T* attn = row_data<const T>(params.attn, row, first);
  const T* dout = row_data<const T>(params.dout, row, first);
  T* dvalue = row_data<T>(params.dvalue, row, row.position);
  for (int part = 0; part < value_dim; part += kChannels) {
    Acc sum[kSums] = {};
    for (uint32_t chunk = 0; chunk < queries.members; chunk += kWarp) {
      const Member member = member_at(params, queries.count, queries.members, chunk);
      Acc weight = 0;
      if (member.valid) {
        weight = widen(attn[offset_of(params.attn, member) + slot_at_query(params, row, queries, member)]);
      }
      add_rows<V>(weight, dout + part, offset_of(params.dout, member), member.valid_lanes, value_dim - part, sum);
    }
    store_row<V>(sum, Acc(1), value_dim - part, dvalue + part);
  }
}

// Adds attn of one query to this warp's own bias table; between two rows the caller synchronises.
template <class T>
__device__ __forceinline__ void bias_grad_row(const LocalAttentionParams& params, const Row& row, Compute<T>* table) {
  int32_t first[kAxes] = {row.position[0], row.position[1], row.position[2]};
  const Box keys = box_of<Side::kKeysOfQuery>(params, first);
  const T* attn = row_data<const T>(params.attn, row, row.position);
  for (uint32_t chunk = 0; chunk < keys.members; chunk += kWarp) {
    const Member member = member_at(params, keys.count, keys.members, chunk);
    if (member.valid) {
      table[bias_entry<Side::kKeysOfQuery>(params, keys, member)] += widen(attn[slot_of(params, member.at)]);
    }
  }
}

}  // namespace natrpb::cuda
