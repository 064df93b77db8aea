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

#include "cuda/irpe_tiles.cuh"

namespace natrpb::cuda::irpe {

enum class Pass { kForward, kBackwardQuery, kBackwardKey };

// How a pass is cut; depends on shapes alone.
struct AttentionPlan {
  int64_t tiles = 0;            // of own rows, per (batch, head)
  int64_t blocks_per_head = 0;  // that take turns at the tiles of a head, all batch entries
  int32_t sweeps = 1;
  int32_t bins = 0;      // of a sweep
  bool vectors = false;  // whether rows can be read 16 bytes at a time
  int64_t tables = 0;    // bytes in params.workspace before the blocks' tables [h, blocks_per_head, index_t.buckets]
};

// A growing maximum moves the base of the exponents only beyond this, so that sums are rarely rescaled: exp(8) does no harm.
inline constexpr int kSlack = 8;

template <class T, Pass kPass>
struct Attention {
  using Acc = Compute<T>;
  static constexpr bool kOwnsQueries = kPass != Pass::kBackwardKey;

  // The two products of a pair: query with key, and dout with value; in the forward pass values have no own rows.
  enum Product { kScore, kValue };

  const IrpeAttentionParams& params;
  const AttentionPlan& plan;
  int own_slice[2], member_slice[2];  // of each product's channels, in shared memory
  int32_t member0;                    // the chunk's first member

  __device__ __forceinline__ Attention(const IrpeAttentionParams& given, const AttentionPlan& cut) : params(given), plan(cut) {}

  // ---- shared memory ----

  using Memory = Shared<T, kPass == Pass::kForward ? 1 : 2>;
  static __device__ Memory& shared() { return *shared_memory<Memory>(); }
  static int64_t shared_bytes(int64_t bins) {
    return static_cast<int64_t>(sizeof(Memory)) + kWarps * bins * kWarp * static_cast<int64_t>(sizeof(Acc));
  }
  static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  static __device__ int32_t batch() { return shared().batch; }
  static __device__ int32_t head() { return shared().head; }
  static __device__ int sweep() { return shared().sweep; }
  static __device__ int32_t own0() { return shared().first_row + warp() * kRows; }       // the warp's first row
  static __device__ Acc* weights() { return shared().weights[warp()]; }                  // the warp's, [kRows][kPairPitch]
  static __device__ int32_t* index() { return shared().index[warp()]; }                  // likewise
  __device__ Acc* bins() const { return shared().bins() + warp() * plan.bins * kWarp; }  // the warp's, [plan.bins][kWarp]

  // Of the maps that the pass sums by, one behind the other.
  static __host__ __device__ int64_t buckets(const IrpeAttentionParams& params) {
    if (kPass == Pass::kForward) return params.index_v.buckets;
    return kPass == Pass::kBackwardKey ? params.index_q.buckets : params.index_k.buckets + params.index_t.buckets;
  }
  __device__ BinRange range() const {
    const int64_t first = int64_t{sweep()} * plan.bins;
    return {first, static_cast<int>(max_of(min_of(buckets(params) - first, plan.bins), 0))};
  }

  // Bins of rows; those of the bias table come behind them and grow over the block's tiles.
  __device__ int own_bins() const {
    return kPass == Pass::kBackwardQuery ? range().below(params.index_k.buckets) : range().count;
  }

  // ---- rows ----

  __device__ int64_t own_count() const { return kOwnsQueries ? params.queries : params.keys; }
  __device__ int64_t member_count() const { return kOwnsQueries ? params.keys : params.queries; }
  __device__ const Matrix& matrix_of(Product product, bool queries) const {
    return product == kScore ? (queries ? params.query : params.key) : (queries ? params.dout : params.value);
  }
  __device__ int slices(Product product) const {
    return static_cast<int>(ceil_div(product == kScore ? params.head_dim : params.value_dim, kSlice));
  }
  // Channels of a slice; 0 past the last one.
  __device__ int width(Product product, int slice) const {
    const int channels = static_cast<int>(product == kScore ? params.head_dim : params.value_dim);
    return static_cast<int>(max_of(min_of(channels - slice * kSlice, kSlice), 0));
  }

  // Rows of the warp, and members of the chunk, that exist.
  __device__ int rows() const { return static_cast<int>(max_of(min_of(own_count() - own0(), kRows), 0)); }
  __device__ int members() const { return static_cast<int>(min_of(member_count() - member0, kWarp)); }

  template <class S>
  __device__ __forceinline__ S* row(const Matrix& matrix, int64_t r) const {
    return static_cast<S*>(matrix.data) + matrix.offset(batch(), head(), r);
  }
  // Rows of one side from `first` on, `count` being all there are; padded keys are closed.
  __device__ __forceinline__ RowRange<T> range_of(Product product, bool queries, int64_t first, int64_t count) const {
    const Matrix& matrix = matrix_of(product, queries);
    const uint8_t* mask = queries ? nullptr : params.key_padding_mask;
    if (mask) mask += int64_t{batch()} * params.keys + first;
    return {row<const T>(matrix, first), matrix.row, static_cast<int>(min_of(count - first, kTile)), mask};
  }

  __device__ __forceinline__ void stage(Product product, int slice, bool with_own) {
    const int count = width(product, slice);
    if (with_own && own_slice[product] != slice) {
      const RowRange<T> own = range_of(product, kOwnsQueries, shared().first_row, own_count());
      const Acc factor = product == kScore ? static_cast<Acc>(params.scale) : Acc(1);
      stage_own(own, int64_t{slice} * kSlice, count, plan.vectors, factor, shared().own[product]);
      own_slice[product] = slice;
    }
    if (member_slice[product] != slice) {
      const RowRange<T> rest = range_of(product, !kOwnsQueries, member0, member_count());
      stage_members(rest, int64_t{slice} * kSlice, count, plan.vectors, shared().members[product]);
      member_slice[product] = slice;
    }
  }
  // Waits for the block twice where the slice is not there yet; all threads call it.
  __device__ __forceinline__ void hold(Product product, int slice, bool with_own) {
    if (member_slice[product] == slice && (!with_own || own_slice[product] == slice)) return;
    __syncthreads();
    stage(product, slice, with_own);
    __syncthreads();
  }

  __device__ __forceinline__ void go_to(int sweep_to, int64_t item) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared().item = item;
      shared().sweep = sweep_to;
      shared().batch = static_cast<int32_t>(item / plan.tiles);
      shared().head = static_cast<int32_t>(blockIdx.x / plan.blocks_per_head);
      shared().first_row = static_cast<int32_t>(item % plan.tiles * kTile);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void begin_chunk(int64_t first) {
    member0 = static_cast<int32_t>(first);
    member_slice[kScore] = member_slice[kValue] = -1;
    __syncthreads();
    stage(kScore, 0, true);
    stage(kValue, kPass == Pass::kForward ? sweep() : 0, kPass != Pass::kForward);
    __syncthreads();
  }
  // s[r] = factor * <own row, member> over all slices
  __device__ __forceinline__ void multiply_slices(Product product, Acc (&s)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) s[r] = 0;
#pragma unroll 1
    for (int slice = 0; slice < slices(product); ++slice) {
      hold(product, slice, true);
      if (rows() > 0) multiply<T>(shared().own[product], shared().members[product], width(product, slice), s);
    }
  }

  // ---- pairs ----

  // entry[r] = map[query, key] of row r and the lane's member, 0 where there is no such pair; map [Nq, Nk]
  template <class E>
  __device__ __forceinline__ void fetch(const E* map, int32_t (&entry)[kRows]) const {
    const int lane = lane_index();
    if (kOwnsQueries) {
      const E* from = map + int64_t{own0()} * params.keys + member0 + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) entry[r] = r < rows() && lane < members() ? from[r * params.keys] : 0;
      return;
    }
    // Neighboring lanes read neighboring keys, the warp's rows; then the map's part is turned.
    const int key = lane % kRows, first = lane / kRows;
    const E* from = map + (int64_t{member0} + first) * params.keys + own0() + key;
#pragma unroll
    for (int step = 0; step < kRows; ++step) {
      const bool there = key < rows() && first + step * kBinLanes < members();
      index()[key * kPairPitch + first + step * kBinLanes] = there ? from[step * kBinLanes * params.keys] : 0;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) entry[r] = index()[r * kPairPitch + lane];
    __syncwarp();
  }
  __device__ __forceinline__ const int32_t* term_of(const BucketMap& map, int64_t term) const {
    return map.data + term * params.queries * params.keys;
  }

  // Bit r: row r and the lane's member exist, and no mask excludes them.
  __device__ __forceinline__ uint32_t open_pairs() const {
    const int lane = lane_index();
    uint32_t open = lane < members() ? (1u << rows()) - 1 : 0;
    if (params.key_padding_mask) {
      const uint8_t* mask = params.key_padding_mask + int64_t{batch()} * params.keys;
      if (kOwnsQueries) {
        if (open && mask[member0 + lane]) open = 0;
      } else {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r < rows() && mask[own0() + r]) open &= ~(1u << r);
        }
      }
    }
    if (params.attn_mask) {
      int32_t excluded[kRows];
      fetch(params.attn_mask, excluded);
#pragma unroll
      for (int r = 0; r < kRows; ++r) open &= ~((excluded[r] ? 1u : 0u) << r);
    }
    return open;
  }

  // s[r] += the sum over a map's terms of from[r * step + bucket], for open pairs
  template <class E>
  __device__ __forceinline__ void look_up(const BucketMap& map, const E* from, int64_t step, uint32_t open,
                                          Acc (&s)[kRows]) const {
#pragma unroll 1
    for (int64_t term = 0; term < map.terms; ++term) {
      int32_t bucket[kRows];
      fetch(term_of(map, term), bucket);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!(open >> r & 1)) continue;
        const bool known = static_cast<uint32_t>(bucket[r]) < map.buckets;
        s[r] += known ? widen(from[r * step + bucket[r]]) : kNaN<Acc>;
      }
    }
  }
  // Of rows of buckets that belong to queries, or to keys.
  __device__ __forceinline__ void look_up_rows(const BucketMap& map, const Matrix& rows_of_buckets, bool of_own, uint32_t open,
                                               Acc (&s)[kRows]) const {
    const T* from = row<const T>(rows_of_buckets, of_own ? own0() : member0 + lane_index());
    look_up(map, from, of_own ? rows_of_buckets.row : 0, open, s);
  }
  __device__ __forceinline__ void add_encodings(uint32_t open, Acc (&s)[kRows]) const {
    if (params.index_k.buckets) look_up_rows(params.index_k, params.query_rows, kOwnsQueries, open, s);
    if (params.index_q.buckets) look_up_rows(params.index_q, params.key_rows, !kOwnsQueries, open, s);
    if (params.index_t.buckets) {
      look_up(params.index_t, static_cast<const Acc*>(params.table) + head() * params.index_t.buckets, 0, open, s);
    }
  }

  // Lets all lanes see the lane's numbers of its pairs.
  __device__ __forceinline__ void share(const Acc (&x)[kRows]) const {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) weights()[r * kPairPitch + lane_index()] = x[r];
    __syncwarp();
  }
  // Adds the shared weights to the bins of a map whose buckets follow `before` others.
  __device__ __forceinline__ void add_to_bins(const BucketMap& map, int64_t before) const {
    const int lane = lane_index(), place = lane / kBinLanes * kPairPitch;
    const uint32_t shift = static_cast<uint32_t>(before - range().first);
#pragma unroll 1
    for (int64_t term = 0; term < map.terms; ++term) {
      int32_t bucket[kRows];
      fetch(term_of(map, term), bucket);
      if (kOwnsQueries) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) index()[r * kPairPitch + lane] = bucket[r];
        __syncwarp();
      }
      for (int k = lane % kBinLanes; k < members(); k += kBinLanes) {
        const uint32_t c = static_cast<uint32_t>(index()[place + k]);
        const bool known = c < map.buckets;
        const uint32_t bin = (known ? c : 0) + shift;
        if (bin < static_cast<uint32_t>(range().count)) {
          bins()[bin * kWarp + lane] += known ? weights()[place + k] : kNaN<Acc>;
        }
      }
      __syncwarp();
    }
  }

  // ---- forward ----

  // The base of a row's exponents: finite, so that infinite scores keep their lse, which inf - inf would lose.
  static __device__ Acc base_of(Acc peak) { return peak - peak == 0 ? peak : 0; }

  // s: scores -> weights exp(score - base), with each row's peak and the lane's share of its total and sums carried on
  __device__ __forceinline__ void softmax(uint32_t open, Acc (&s)[kRows], Acc (&peak)[kRows], Acc (&total)[kRows],
                                          Acc (&sum)[kRows][kLaneChannels]) const {
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
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) sum[r][i] *= shrink[r];
    }
    const Acc factor = pick(shrink, lane_index() / kBinLanes);
    for (int c = 0; c < range().count; ++c) bins()[c * kWarp + lane_index()] *= factor;
  }

  __device__ __forceinline__ void forward_tile() {
    own_slice[kScore] = own_slice[kValue] = -1;
    clear_bins(bins(), range().count);
    Acc peak[kRows], total[kRows], sum[kRows][kLaneChannels] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      peak[r] = -kInfinity<Acc>;
      total[r] = 0;
    }
#pragma unroll 1
    for (int64_t chunk = 0; chunk < params.keys; chunk += kWarp) {
      begin_chunk(chunk);
      Acc s[kRows];
      multiply_slices(kScore, s);
      if (rows() == 0) continue;
      const uint32_t open = open_pairs();
      add_encodings(open, s);
      softmax(open, s, peak, total, sum);
      share(s);
      if (range().count > 0) add_to_bins(params.index_v, 0);
      if (width(kValue, sweep()) > 0) add_weighted<T>(weights(), shared().members[kValue], members(), sum);
    }
    if (rows() == 0) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) total[r] = warp_sum(total[r]);
    // Lane r finishes row r.
    const int lane = lane_index();
    const Acc all = pick(total, lane), inverse = all == 0 ? 0 : 1 / all;
    if (sweep() == 0 && lane < rows()) *row<Acc>(params.lse, own0() + lane) = base_of(pick(peak, lane)) + std::log(all);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Acc factor = __shfl_sync(kAllLanes, inverse, r);
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) sum[r][i] *= factor;
    }
    store_rows<T>(sum, 1, rows(), row<T>(params.out, own0()) + int64_t{sweep()} * kSlice, params.out.row,
                  width(kValue, sweep()));
    const Acc of_bins = __shfl_sync(kAllLanes, inverse, lane / kBinLanes);
    if (range().count > 0) {
      store_bins<T>(bins(), range().count, of_bins, rows(), row<T>(params.binned, own0()) + range().first, params.binned.row);
    }
  }

  // ---- backward ----

  // The lane's share of <a, b> of one row.
  __device__ __forceinline__ Acc lane_dot(const Matrix& a, const Matrix& b, int64_t r, int64_t columns) const {
    const T *x = row<const T>(a, r), *y = row<const T>(b, r);
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
    if (params.dlse.data) delta -= *row<const Acc>(params.dlse, query);
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
    multiply_slices(kScore, p);
    multiply_slices(kValue, ds);
    if (rows() == 0) return 0;
    const uint32_t open = open_pairs();
    add_encodings(open, p);
    if (params.dbinned.data) look_up_rows(params.index_v, params.dbinned, kOwnsQueries, open, ds);
    return open;
  }

  __device__ __forceinline__ void backward_query_tile() {
    own_slice[kScore] = own_slice[kValue] = -1;
    clear_bins(bins(), own_bins());
    Acc sum[kRows][kLaneChannels] = {}, lse = 0, delta = 0;  // lane r has lse and delta of row r
#pragma unroll 1
    for (int r = 0; r < rows(); ++r) {
      const Acc found = find_delta(own0() + r);
      if (lane_index() != r) continue;
      delta = found;
      lse = *row<const Acc>(params.lse, own0() + r);
    }
#pragma unroll 1
    for (int64_t chunk = 0; chunk < params.keys; chunk += kWarp) {
      begin_chunk(chunk);
      Acc p[kRows], ds[kRows];
      const uint32_t open = backward_products(p, ds);
      if (width(kScore, sweep()) > 0) hold(kScore, sweep(), false);
      if (rows() == 0) continue;
      softmax_backward(open, lse, delta, p, ds);
      share(ds);
      if (own_bins() > 0) add_to_bins(params.index_k, 0);
      if (own_bins() < range().count) add_to_bins(params.index_t, params.index_k.buckets);
      if (width(kScore, sweep()) > 0) add_weighted<T>(weights(), shared().members[kScore], members(), sum);
    }
    if (rows() == 0) return;
    const Acc scale = static_cast<Acc>(params.scale);
    store_rows<T>(sum, scale, rows(), row<T>(params.dquery, own0()) + int64_t{sweep()} * kSlice, params.dquery.row,
                  width(kScore, sweep()));
    if (own_bins() > 0) {
      store_bins<T>(bins(), own_bins(), 1, rows(), row<T>(params.dquery_rows, own0()) + range().first, params.dquery_rows.row);
    }
  }

  __device__ __forceinline__ void backward_key_tile() {
    own_slice[kScore] = own_slice[kValue] = -1;
    clear_bins(bins(), range().count);
    Acc dkey[kRows][kLaneChannels] = {}, dvalue[kRows][kLaneChannels] = {};
#pragma unroll 1
    for (int64_t chunk = 0; chunk < params.queries; chunk += kWarp) {
      begin_chunk(chunk);
      Acc p[kRows], ds[kRows];
      const uint32_t open = backward_products(p, ds);
      if (width(kScore, sweep()) > 0) hold(kScore, sweep(), false);
      if (width(kValue, sweep()) > 0) hold(kValue, sweep(), false);
      if (rows() == 0) continue;
      const int64_t query = member0 + lane_index();
      const Acc lse = open ? *row<const Acc>(params.lse, query) : 0, delta = open ? *delta_of(query) : 0;
      softmax_backward(open, lse, delta, p, ds);
      share(ds);
      if (range().count > 0) add_to_bins(params.index_q, 0);
      if (width(kScore, sweep()) > 0) add_weighted<T>(weights(), shared().members[kScore], members(), dkey);
      share(p);
      if (width(kValue, sweep()) > 0) add_weighted<T>(weights(), shared().members[kValue], members(), dvalue);
    }
    if (rows() == 0) return;
    const Acc scale = static_cast<Acc>(params.scale);
    store_rows<T>(dkey, scale, rows(), row<T>(params.dkey, own0()) + int64_t{sweep()} * kSlice, params.dkey.row,
                  width(kScore, sweep()));
    store_rows<T>(dvalue, 1, rows(), row<T>(params.dvalue, own0()) + int64_t{sweep()} * kSlice, params.dvalue.row,
                  width(kValue, sweep()));
    if (range().count > 0) {
      store_bins<T>(bins(), range().count, 1, rows(), row<T>(params.dkey_rows, own0()) + range().first, params.dkey_rows.row);
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
