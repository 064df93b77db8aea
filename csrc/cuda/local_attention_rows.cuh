// Fused local attention, one warp per row, for every pattern, storage type, head size and stride.
//
//   forward         out_i = sum_j p_ij value_j,  p_ij = exp(s_ij - lse_i),  s_ij = scale <query_i, key_j> + rpb[j - i + K - 1]
//   backward query  delta_i = <dout_i, out_i> - dlse_i,  ds_ij = p_ij (<dout_i, value_j> - delta_i),
//                   dquery_i = scale sum_j ds_ij key_j,  drpb[j - i + K - 1] += ds_ij
//   backward key    dkey_j = scale sum_i ds_ij query_i,  dvalue_j = sum_i p_ij dout_i  over the queries that see key j
//
// A warp goes through its row's box 32 members at a time: dot products by eight lanes a member, then one score per lane, then
// the weighted sums (rows.cuh). The forward's softmax is online. Bytes: each row reads the other side's rows of its box, mostly
// from L1 and L2 since neighboring warps share them; from DRAM the forward moves query, key, value, out and lse once, the two
// passes of the backward query, key, value, dout twice and out, lse, dlse, dquery, dkey, dvalue once.
#pragma once

#include "cuda/rows.cuh"

namespace natrpb::cuda {

// out and lse of one query.
template <class T, int V>
__device__ __forceinline__ void forward_row(const LocalAttentionParams& params, const Row& row) {
  using Acc = Compute<T>;
  const int head_dim = static_cast<int>(params.head_dim), value_dim = static_cast<int>(params.value_dim);
  int32_t first[kAxes] = {row.position[0], row.position[1], row.position[2]};
  const Box keys = box_of<Side::kKeysOfQuery>(params, first);
  const T* query = row_data<const T>(params.query, row, row.position);
  const T* key = row_data<const T>(params.key, row, first);
  const T* value = row_data<const T>(params.value, row, first);
  const Acc* bias = static_cast<const Acc*>(params.rpb);
  if (bias) bias += row.head * table_entries(params);
  const Acc scale = static_cast<Acc>(params.scale);

  // The sums of kChannels channels stay in registers; a wider value computes its scores again for each such part.
  for (int part = 0; part == 0 || part < value_dim; part += kChannels) {
    Acc sum[kSums] = {};
    Acc peak = -kInfinity<Acc>, base = 0, total = 0;  // total: this lane's share of sum exp(s - base)
    for (uint32_t chunk = 0; chunk < keys.members; chunk += kWarp) {
      const Member member = member_at(params, keys.count, keys.members, chunk);
      const int64_t offset = offset_of(params.key, member);
      Acc score = dots<V>(scale, query, key, offset, member.valid_lanes, head_dim);
      if (bias && member.valid) score += bias[bias_entry<Side::kKeysOfQuery>(params, keys, member)];
      if (!member.valid) score = -kInfinity<Acc>;
      const Acc last_peak = peak;
      peak = std::fmax(peak, warp_max(score));
      base = peak - peak == 0 ? peak : 0;  // an infinite score: inf - inf would lose lse
      const Acc shrink = peak == last_peak ? 1 : std::exp(last_peak - peak);
      const Acc weight = member.valid ? std::exp(score - base) : 0;
      total = total * shrink + weight;
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] *= shrink;
      add_rows<V>(weight, value + part, offset_of(params.value, member), member.valid_lanes, value_dim - part, sum);
    }
    total = warp_sum(total);
    store_row<V>(sum, 1 / total, value_dim - part, row_data<T>(params.out, row, row.position) + part);
    if (part == 0 && lane_index() == 0) *row_data<Acc>(params.lse, row, row.position) = base + std::log(total);
  }
}

// dquery of one query; writes *delta for the key pass and, where `table` is not null, adds ds to this warp's own bias table.
// A query's pairs have distinct entries, so the lanes of a chunk never meet in one; between two rows the caller synchronises.
template <class T, int V>
__device__ __forceinline__ void backward_query_row(const LocalAttentionParams& params, const Row& row, Compute<T>* delta,
                                                   Compute<T>* table) {
  using Acc = Compute<T>;
  const int head_dim = static_cast<int>(params.head_dim), value_dim = static_cast<int>(params.value_dim);
  int32_t first[kAxes] = {row.position[0], row.position[1], row.position[2]};
  const Box keys = box_of<Side::kKeysOfQuery>(params, first);
  const T* query = row_data<const T>(params.query, row, row.position);
  const T* dout = row_data<const T>(params.dout, row, row.position);
  const T* out = row_data<const T>(params.out, row, row.position);
  const T* key = row_data<const T>(params.key, row, first);
  const T* value = row_data<const T>(params.value, row, first);
  const Acc* bias = static_cast<const Acc*>(params.rpb);
  if (bias) bias += row.head * table_entries(params);
  const Acc scale = static_cast<Acc>(params.scale);
  const Acc lse = *row_data<const Acc>(params.lse, row, row.position);

  Acc mean = 0;  // sum_j p_ij <dout_i, value_j>
  for (int c = lane_index() * V; c < value_dim; c += kWarp * V) {
    Acc x[V], y[V];
    load<V>(dout + c, x);
    load<V>(out + c, y);
#pragma unroll
    for (int i = 0; i < V; ++i) mean += x[i] * y[i];
  }
  mean = warp_sum(mean);
  if (params.dlse.data) mean -= *row_data<const Acc>(params.dlse, row, row.position);
  if (lane_index() == 0) *delta = mean;

  for (int part = 0; part == 0 || part < head_dim; part += kChannels) {
    Acc sum[kSums] = {};
    for (uint32_t chunk = 0; chunk < keys.members; chunk += kWarp) {
      const Member member = member_at(params, keys.count, keys.members, chunk);
      const int64_t key_offset = offset_of(params.key, member);
      const int64_t entry = bias_entry<Side::kKeysOfQuery>(params, keys, member);
      Acc score = dots<V>(scale, query, key, key_offset, member.valid_lanes, head_dim);
      if (bias && member.valid) score += bias[entry];
      const Acc weight = std::exp(score - lse);
      const Acc dweight = dots<V>(Acc(1), dout, value, offset_of(params.value, member), member.valid_lanes, value_dim);
      const Acc dscore = weight * (dweight - mean);
      if (table && part == 0 && member.valid) table[entry] += dscore;
      add_rows<V>(dscore, key + part, key_offset, member.valid_lanes, head_dim - part, sum);
    }
    store_row<V>(sum, scale, head_dim - part, row_data<T>(params.dquery, row, row.position) + part);
  }
}

// dkey and dvalue of one key. delta [B, h, *] as backward_query_row wrote it, `delta_step` numbers apart.
template <class T, int V>
__device__ __forceinline__ void backward_key_row(const LocalAttentionParams& params, const Row& row, const Compute<T>* delta,
                                                 int delta_step) {
  using Acc = Compute<T>;
  const int head_dim = static_cast<int>(params.head_dim), value_dim = static_cast<int>(params.value_dim);
  int32_t first[kAxes] = {row.position[0], row.position[1], row.position[2]};
  const Box queries = box_of<Side::kQueriesOfKey>(params, first);
  const T* key = row_data<const T>(params.key, row, row.position);
  const T* value = row_data<const T>(params.value, row, row.position);
  const T* query = row_data<const T>(params.query, row, first);
  const T* dout = row_data<const T>(params.dout, row, first);
  const Acc* lse = row_data<const Acc>(params.lse, row, first);
  const Acc* bias = static_cast<const Acc*>(params.rpb);
  if (bias) bias += row.head * table_entries(params);
  const Acc scale = static_cast<Acc>(params.scale);
  // delta[(b * h + head) * N + flat position]
  delta += delta_step * ((int64_t{row.batch} * params.heads + row.head) * positions_of(params) + flat_position(params, first));

  const int channels = head_dim > value_dim ? head_dim : value_dim;
  for (int part = 0; part == 0 || part < channels; part += kChannels) {
    Acc dkey_sum[kSums] = {}, dvalue_sum[kSums] = {};
    for (uint32_t chunk = 0; chunk < queries.members; chunk += kWarp) {
      const Member member = member_at(params, queries.count, queries.members, chunk);
      const int64_t query_offset = offset_of(params.query, member);
      const int64_t dout_offset = offset_of(params.dout, member);
      Acc score = dots<V>(scale, key, query, query_offset, member.valid_lanes, head_dim);
      const Acc dweight = dots<V>(Acc(1), value, dout, dout_offset, member.valid_lanes, value_dim);
      Acc weight = 0, dscore = 0;
      if (member.valid) {
        if (bias) score += bias[bias_entry<Side::kQueriesOfKey>(params, queries, member)];
        weight = std::exp(score - lse[offset_of(params.lse, member)]);
        dscore = weight * (dweight - delta[delta_step * flat_position(params, member.step)]);
      }
      add_rows<V>(dscore, query + part, query_offset, member.valid_lanes, head_dim - part, dkey_sum);
      add_rows<V>(weight, dout + part, dout_offset, member.valid_lanes, value_dim - part, dvalue_sum);
    }
    store_row<V>(dkey_sum, scale, head_dim - part, row_data<T>(params.dkey, row, row.position) + part);
    store_row<V>(dvalue_sum, Acc(1), value_dim - part, row_data<T>(params.dvalue, row, row.position) + part);
  }
}

}  // namespace natrpb::cuda
