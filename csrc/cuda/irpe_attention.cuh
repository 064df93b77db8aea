// Attention with image relative position encodings for every storage type, size and stride (natrpb/irpe.h has the formulas).
//
//   forward         out_i, lse_i, binned_i; the softmax is online
//   backward query  delta_i = <dout_i, out_i> + <dbinned_i, binned_i> - dlse_i,
//                   ds_ij = p_ij (<dout_i, value_j> + dbinned[i, index_v(i,j)] - delta_i),
//                   dquery_i = scale sum_j ds_ij key_j, dquery_rows[i, index_k(i,j)] += ds_ij, dtable[index_t(i,j)] += ds_ij
//   backward key    dkey_j = scale sum_i ds_ij query_i, dvalue_j = sum_i p_ij dout_i, dkey_rows[j, index_q(i,j)] += ds_ij
//
// A block holds kTile rows of one (batch, head), queries or, in the last pass, keys; the rows on the other side are its members,
// kWarp at a time (irpe_tiles.cuh). A lane has the pairs of the warp's kRows rows with one member: products, lookups and softmax
// are the lane's own. Results beyond kSlice channels, or beyond the bins that shared memory holds, take several sweeps over the
// members, each with its slice and its range of buckets. Orders of summation are fixed.
//
// Bytes: a block reads the other side's rows once per sweep, from L2; from DRAM every tensor moves once per pass.
#pragma once

#include "cuda/irpe_pairs.cuh"

namespace natrpb::cuda::irpe {

// A growing maximum moves the base of the exponents only beyond this, so that sums are rarely rescaled: exp(8) does no harm.
inline constexpr int kSlack = 8;

template <class T, Pass kPass>
struct Attention : Pairs<T, kPass> {
  using Base = Pairs<T, kPass>;
  using Base::add;
  using Base::add_encodings;
  using Base::add_to_bins;
  using Base::Base;
  using Base::batch;
  using Base::begin_chunk;
  using Base::bins;
  using Base::go_to;
  using Base::head;
  using Base::hold;
  using Base::kOwnsQueries;
  using Base::kScore;
  using Base::kValue;
  using Base::look_up_members;
  using Base::look_up_own;
  using Base::member0;
  using Base::multiply;
  using Base::open_pairs;
  using Base::own0;
  using Base::own_bins;
  using Base::own_slice;
  using Base::params;
  using Base::plan;
  using Base::range;
  using Base::row;
  using Base::rows;
  using Base::share;
  using Base::shared;
  using Base::store;
  using Base::sweep;
  using Base::wide_row;
  using Base::width;
  using typename Base::Acc;
  using typename Base::Product;
  using typename Base::Sum;

  // ---- forward ----

  // The base of a row's exponents: finite, so that infinite scores keep their lse, which inf - inf would lose.
  static __device__ Acc base_of(Acc peak) { return peak - peak == 0 ? peak : 0; }

  // s: scores -> weights exp(score - base), with each row's peak and the lane's share of its total and sums carried on
  __device__ __forceinline__ void softmax(uint32_t open, Acc (&s)[kRows], Acc (&peak)[kRows], Acc (&total)[kRows],
                                          Sum& sum) const {
    Acc shrink[kRows];
    bool shrinks = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool is_open = open >> r & 1;
      const Acc top = warp_max(is_open ? s[r] : -kInfinity<Acc>);
      shrink[r] = 1;
      if (top > peak[r] + kSlack) {
        shrink[r] = std::exp(peak[r] - top);
        peak[r] = top;
        shrinks = true;
      }
      s[r] = is_open ? std::exp(s[r] - base_of(peak[r])) : 0;
      total[r] = total[r] * shrink[r] + s[r];
    }
    if (!shrinks) return;
    Product::scale([&](int r) { return pick(shrink, r); }, sum);
    const Acc factor = pick(shrink, lane_index() / kBinLanes);
    for (int c = 0, count = range().count; c < count; ++c) bins()[c * kWarp + lane_index()] *= factor;
  }

  __device__ __forceinline__ void forward_tile() {
    own_slice[kScore] = own_slice[kValue] = -1;
    clear_bins(bins(), range().count);
    Acc peak[kRows], total[kRows];
    Sum sum = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      peak[r] = -kInfinity<Acc>;
      total[r] = 0;
    }
#pragma unroll 1
    for (int64_t chunk = 0; chunk < params.keys; chunk += kWarp) {
      begin_chunk(chunk);
      Acc s[kRows];
      multiply(kScore, s);
      if (rows() == 0) continue;
      const uint32_t open = open_pairs();
      add_encodings(open, s);
      softmax(open, s, peak, total, sum);
      if (range().count > 0) {
        share(s);
        add_to_bins(params.index_v, 0);
      }
      add(kValue, s, sum);
    }
    if (rows() == 0) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) total[r] = warp_sum(total[r]);
    // Lane r finishes row r.
    const int lane = lane_index();
    const Acc all = pick(total, lane), inverse = all == 0 ? 0 : 1 / all;
    if (sweep() == 0 && lane < rows()) *wide_row(params.lse, own0() + lane) = base_of(pick(peak, lane)) + std::log(all);
    Product::scale([&](int r) { return __shfl_sync(kAllLanes, inverse, r); }, sum);
    store(kValue, sum, params.out);
    const Acc of_bins = __shfl_sync(kAllLanes, inverse, lane / kBinLanes);
    if (range().count > 0) {
      store_bins<T>(bins(), range().count, of_bins, rows(), row(params.binned, own0()) + range().first, params.binned.row);
    }
  }

  // ---- backward ----

  // The lane's share of <a, b> of one row.
  __device__ __forceinline__ Acc lane_dot(const RowsView& a, const RowsView& b, int64_t r, int64_t columns) const {
    const T *x = row(a, r), *y = row(b, r);
    Acc sum = 0;
    for (int64_t c = lane_index(); c < columns; c += kWarp) sum += widen(x[c]) * widen(y[c]);
    return sum;
  }
  __device__ __forceinline__ Acc* delta_of(int64_t query) const {
    return static_cast<Acc*>(params.workspace) + (int64_t{batch()} * params.heads + head()) * params.queries + query;
  }
  __device__ __forceinline__ Acc find_delta(int64_t query) const {
    Acc delta = lane_dot(params.dout, params.out, query, params.value_dim);
    if (params.dbinned.data) delta += lane_dot(params.dbinned, params.binned, query, params.index_v.buckets);
    delta = warp_sum(delta);
    if (params.dlse.data) delta -= *wide_row(params.dlse, query);
    if (sweep() == 0 && lane_index() == 0) *delta_of(query) = delta;
    return delta;
  }

  // p: scores -> weights;  ds: d weights -> d scores. lse and delta are the row's, in lane r, or the member's, in its own lane.
  __device__ __forceinline__ void softmax_backward(uint32_t open, Acc lse, Acc delta, Acc (&p)[kRows], Acc (&ds)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool is_open = open >> r & 1;
      const Acc lse_of_pair = kOwnsQueries ? __shfl_sync(kAllLanes, lse, r) : lse;
      const Acc delta_of_pair = kOwnsQueries ? __shfl_sync(kAllLanes, delta, r) : delta;
      p[r] = is_open ? std::exp(p[r] - lse_of_pair) : 0;
      ds[r] = is_open ? p[r] * (ds[r] - delta_of_pair) : 0;
    }
  }
  // Scores and d weights of the chunk's pairs; returns which are open.
  __device__ __forceinline__ uint32_t backward_products(Acc (&p)[kRows], Acc (&ds)[kRows]) {
    multiply(kScore, p);
    multiply(kValue, ds);
    if (rows() == 0) return 0;
    const uint32_t open = open_pairs();
    add_encodings(open, p);
    if (params.dbinned.data) {
      kOwnsQueries ? look_up_own(params.index_v, params.dbinned, open, ds) : look_up_members(params.index_v, 1, open, ds);
    }
    return open;
  }

  __device__ __forceinline__ void backward_query_tile() {
    own_slice[kScore] = own_slice[kValue] = -1;
    clear_bins(bins(), own_bins());
    Sum sum = {};
    Acc lse = 0, delta = 0;  // lane r has those of row r
#pragma unroll 1
    for (int r = 0; r < rows(); ++r) {
      const Acc found = find_delta(own0() + r);
      if (lane_index() != r) continue;
      delta = found;
      lse = *wide_row(params.lse, own0() + r);
    }
#pragma unroll 1
    for (int64_t chunk = 0; chunk < params.keys; chunk += kWarp) {
      begin_chunk(chunk);
      Acc p[kRows], ds[kRows];
      const uint32_t open = backward_products(p, ds);
      if (width(kScore, sweep()) > 0) hold(kScore, sweep(), false);
      if (rows() == 0) continue;
      softmax_backward(open, lse, delta, p, ds);
      if (range().count > 0) share(ds);
      if (own_bins() > 0) add_to_bins(params.index_k, 0);
      if (own_bins() < range().count) add_to_bins(params.index_t, params.index_k.buckets);
      add(kScore, ds, sum);
    }
    if (rows() == 0) return;
    Product::scale([&](int) { return static_cast<Acc>(params.scale); }, sum);
    store(kScore, sum, params.dquery);
    if (own_bins() > 0) {
      store_bins<T>(bins(), own_bins(), 1, rows(), row(params.dquery_rows, own0()) + range().first, params.dquery_rows.row);
    }
  }

  __device__ __forceinline__ void backward_key_tile() {
    own_slice[kScore] = own_slice[kValue] = -1;
    clear_bins(bins(), range().count);
    Sum dkey = {}, dvalue = {};
#pragma unroll 1
    for (int64_t chunk = 0; chunk < params.queries; chunk += kWarp) {
      begin_chunk(chunk);
      Acc p[kRows], ds[kRows];
      const uint32_t open = backward_products(p, ds);
      if (width(kScore, sweep()) > 0) hold(kScore, sweep(), false);
      if (width(kValue, sweep()) > 0) hold(kValue, sweep(), false);
      if (rows() == 0) continue;
      const int64_t query = member0 + lane_index();
      const Acc lse = open ? *wide_row(params.lse, query) : 0, delta = open ? *delta_of(query) : 0;
      softmax_backward(open, lse, delta, p, ds);
      if (range().count > 0) {
        share(ds);
        add_to_bins(params.index_q, 0);
      }
      add(kScore, ds, dkey);
      add(kValue, p, dvalue);
    }
    if (rows() == 0) return;
    Product::scale([&](int) { return static_cast<Acc>(params.scale); }, dkey);
    store(kScore, dkey, params.dkey);
    store(kValue, dvalue, params.dvalue);
    if (range().count > 0) {
      store_bins<T>(bins(), range().count, 1, rows(), row(params.dkey_rows, own0()) + range().first, params.dkey_rows.row);
    }
  }

  // Adds the block's bins of the bias table, which grew over its tiles, and writes them to its table.
  __device__ __forceinline__ void store_table() const {
    __syncthreads();
    Acc* table =
        reinterpret_cast<Acc*>(static_cast<char*>(params.workspace) + plan.tables) + blockIdx.x * params.index_t.buckets;
    const Acc* all = shared().bins();
    for (int c = own_bins() + static_cast<int>(threadIdx.x); c < range().count; c += kThreads) {
      Acc sum = 0;
      for (int i = 0; i < kThreads; ++i) {  // every thread begins in another bank
        sum += all[(i / kWarp * plan.bins + c) * kWarp + (i + lane_index()) % kWarp];
      }
      table[range().first + c - params.index_k.buckets] = sum;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    const int64_t items = params.batch * plan.tiles;
#pragma unroll 1
    for (go_to(0, 0); sweep() < plan.sweeps; go_to(sweep() + 1, 0)) {
      clear_bins(bins() + own_bins() * kWarp, range().count - own_bins());
#pragma unroll 1
      for (go_to(sweep(), blockIdx.x % plan.blocks_per_head); shared().item < items;
           go_to(sweep(), shared().item + plan.blocks_per_head)) {
        if constexpr (kPass == Pass::kForward) forward_tile();
        if constexpr (kPass == Pass::kBackwardQuery) backward_query_tile();
        if constexpr (kPass == Pass::kBackwardKey) backward_key_tile();
      }
      if (own_bins() < range().count) store_table();
    }
  }
};

}  // namespace natrpb::cuda::irpe
