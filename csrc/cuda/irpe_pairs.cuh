// The pairs of a block's rows with a chunk of members: rows staged, products, masks, encodings looked up, sums by bucket. What the
// passes of irpe_attention.cuh have in common.
#pragma once

#include "cuda/irpe_products.cuh"

namespace natrpb::cuda::irpe {

enum class Pass { kForward, kBackwardQuery, kBackwardKey };

// How a pass is cut; depends on shapes alone.
struct AttentionPlan {
  int64_t tiles = 0;            // of own rows, per (batch, head)
  int64_t blocks_per_head = 0;  // that take turns at the tiles of a head, all batch entries
  int32_t sweeps = 1;
  int32_t bins = 0;                  // of a sweep
  int32_t lookup_pitch[2] = {0, 0};  // of the members' rows of buckets in shared memory; 0 where they are read from L1
  bool vectors = false;              // whether rows can be read 16 bytes at a time
  int64_t tables = 0;  // bytes in params.workspace before the blocks' tables [h, blocks_per_head, index_t.buckets]
};

template <class T, Pass kPass>
struct Pairs {
  using Acc = Compute<T>;
  using Product = Products<T>;
  using Sum = typename Product::Sum;
  static constexpr bool kOwnsQueries = kPass != Pass::kBackwardKey;

  // The two products of a pair: query with key, and dout with value; in the forward pass values have no own rows.
  enum Factors { kScore, kValue };

  const IrpeAttentionParams& params;
  const AttentionPlan& plan;
  int own_slice[2], member_slice[2];  // of each product's channels, in shared memory
  int32_t member0;                    // the chunk's first member

  __device__ __forceinline__ Pairs(const IrpeAttentionParams& given, const AttentionPlan& cut) : params(given), plan(cut) {}

  // ---- shared memory ----

  using Memory = Shared<T, typename Product::Own, kPass == Pass::kForward ? 1 : 2>;
  static __device__ Memory& shared() { return *shared_memory<Memory>(); }
  // Behind it the warps' bins [kWarps][plan.bins][kWarp] and the members' rows of buckets [kWarp][plan.lookup_pitch].
  static constexpr int64_t kBinBytes = kWarps * kWarp * sizeof(Acc);
  static int64_t shared_bytes(const AttentionPlan& plan) {
    const int64_t lookups = plan.lookup_pitch[0] + plan.lookup_pitch[1];
    return static_cast<int64_t>(sizeof(Memory)) + plan.bins * kBinBytes + lookups * kWarp * static_cast<int64_t>(sizeof(T));
  }
  static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  static __device__ int32_t batch() { return shared().batch; }
  static __device__ int32_t head() { return shared().head; }
  static __device__ int sweep() { return shared().sweep; }
  static __device__ int32_t own0() { return shared().first_row + warp() * kRows; }       // the warp's first row
  static __device__ Acc* weights() { return shared().weights[warp()]; }                  // the warp's, [kRows][kPairPitch]
  static __device__ int32_t* index() { return shared().index[warp()]; }                  // likewise
  __device__ Acc* bins() const { return shared().bins() + warp() * plan.bins * kWarp; }  // the warp's, [plan.bins][kWarp]

  __device__ T* lookups(int i) const {
    return reinterpret_cast<T*>(shared().bins() + kWarps * plan.bins * kWarp) + i * plan.lookup_pitch[0] * kWarp;
  }

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
  __device__ const RowsView& matrix_of(Factors factors, bool queries) const {
    return factors == kScore ? (queries ? params.query : params.key) : (queries ? params.dout : params.value);
  }
  __device__ int slices(Factors factors) const {
    return static_cast<int>(ceil_div(factors == kScore ? params.head_dim : params.value_dim, kSlice));
  }
  // Channels of a slice; 0 past the last one.
  __device__ int width(Factors factors, int slice) const {
    const int channels = static_cast<int>(factors == kScore ? params.head_dim : params.value_dim);
    return static_cast<int>(max_of(min_of(channels - slice * kSlice, kSlice), 0));
  }

  // Rows of the warp, and members of the chunk, that exist.
  __device__ int rows() const { return static_cast<int>(max_of(min_of(own_count() - own0(), kRows), 0)); }
  __device__ int members() const { return static_cast<int>(min_of(member_count() - member0, kWarp)); }

  __device__ __forceinline__ T* row(const RowsView& matrix, int64_t r) const {
    return static_cast<T*>(matrix.data) + matrix.offset(batch(), head(), r);
  }
  __device__ __forceinline__ Acc* wide_row(const RowsView& matrix, int64_t r) const {  // of lse and dlse
    return static_cast<Acc*>(matrix.data) + matrix.offset(batch(), head(), r);
  }
  // Rows of one side from `first` on, `count` being all there are; padded keys are closed.
  __device__ __forceinline__ RowRange<T> range_of(Factors factors, bool queries, int64_t first, int64_t count) const {
    const RowsView& matrix = matrix_of(factors, queries);
    const uint8_t* mask = queries ? nullptr : params.key_padding_mask;
    if (mask) mask += int64_t{batch()} * params.keys + first;
    return {row(matrix, first), matrix.row, static_cast<int>(min_of(count - first, kTile)), mask};
  }

  __device__ __forceinline__ void stage(Factors factors, int slice, bool with_own) {
    const int64_t first = int64_t{slice} * kSlice;
    if (with_own && own_slice[factors] != slice) {
      const RowRange<T> own = range_of(factors, kOwnsQueries, shared().first_row, own_count());
      stage_rows(own, first, width(factors, slice), plan.vectors, shared().own[factors]);
      own_slice[factors] = slice;
    }
    if (member_slice[factors] != slice) {
      const RowRange<T> others = range_of(factors, !kOwnsQueries, member0, member_count());
      stage_rows(others, first, width(factors, slice), plan.vectors, shared().members[factors]);
      member_slice[factors] = slice;
    }
  }
  // The rows of buckets that belong to members; two sorts of them where these are queries.
  static __host__ __device__ const RowsView& lookup_rows(const IrpeAttentionParams& params, int i) {
    return kOwnsQueries ? params.key_rows : i == 0 ? params.query_rows : params.dbinned;
  }
  static __host__ __device__ int64_t lookup_buckets(const IrpeAttentionParams& params, int i) {
    if (kOwnsQueries) return i == 0 ? params.index_q.buckets : 0;
    return i == 0 ? params.index_k.buckets : params.dbinned.data ? params.index_v.buckets : 0;
  }
  __device__ __forceinline__ void stage_lookups(int i) const {
    const int pitch = plan.lookup_pitch[i];
    if (pitch == 0) return;
    const RowsView& rows_of_buckets = lookup_rows(params, i);
    const int buckets = static_cast<int>(lookup_buckets(params, i));
#pragma unroll 1
    for (int r = warp(); r < members(); r += kWarps) {
      const T* from = row(rows_of_buckets, member0 + r);
      for (int c = lane_index(); c < buckets; c += kWarp) lookups(i)[r * pitch + c] = from[c];
    }
  }
  // Waits for the block twice where the slice is not there yet; all threads call it.
  __device__ __forceinline__ void hold(Factors factors, int slice, bool with_own) {
    if (member_slice[factors] == slice && (!with_own || own_slice[factors] == slice)) return;
    __syncthreads();
    stage(factors, slice, with_own);
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
    for (int i = 0; i < 2; ++i) stage_lookups(i);
    __syncthreads();
  }
  // s[r] = <row r, the lane's member> over all slices
  __device__ __forceinline__ void multiply(Factors factors, Acc (&s)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) s[r] = 0;
#pragma unroll 1
    for (int slice = 0; slice < slices(factors); ++slice) {
      hold(factors, slice, true);
      if (rows() == 0) continue;
      const auto* own = shared().own[factors] + warp() * kRows * kPitch<typename Product::Own>;
      Product::multiply(own, shared().members[factors], width(factors, slice), weights(), s);
    }
  }
  // sum[r] += the members' sum of x[r] * member, over the slice that is held
  __device__ __forceinline__ void add(Factors factors, const Acc (&x)[kRows], Sum& sum) const {
    const int count = width(factors, sweep());
    if (count > 0) Product::add(x, weights(), index(), shared().members[factors], members(), count, sum);
  }
  __device__ __forceinline__ void store(Factors factors, const Sum& sum, const RowsView& matrix) const {
    Product::store(sum, rows(), width(factors, sweep()), row(matrix, own0()) + int64_t{sweep()} * kSlice, matrix.row);
  }

  // ---- pairs ----

  // entry[r] = map[query, key] of row r and the lane's member, 0 where there is no such pair; map [Nq, Nk]
  template <class E>
  __device__ __forceinline__ void fetch(const E* map, int32_t (&entry)[kRows]) const {
    const int lane = lane_index(), existing_rows = rows(), existing_members = members();
    if (kOwnsQueries) {
      const E* from = map + int64_t{own0()} * params.keys + member0 + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) entry[r] = r < existing_rows && lane < existing_members ? from[r * params.keys] : 0;
      return;
    }
    // Neighboring lanes read neighboring keys, the warp's rows; then the map's part is turned.
    const int key = lane % kRows, first = lane / kRows;
    const E* from = map + (int64_t{member0} + first) * params.keys + own0() + key;
#pragma unroll
    for (int step = 0; step < kRows; ++step) {
      const int member = first + step * kBinLanes;
      entry[step] = key < existing_rows && member < existing_members ? from[step * kBinLanes * params.keys] : 0;
    }
#pragma unroll
    for (int step = 0; step < kRows; ++step) index()[key * kPairPitch + first + step * kBinLanes] = entry[step];
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
  // The same of rows of buckets that belong to the warp's rows, or to members.
  __device__ __forceinline__ void look_up_own(const BucketMap& map, const RowsView& rows_of_buckets, uint32_t open,
                                              Acc (&s)[kRows]) const {
    look_up<T>(map, row(rows_of_buckets, own0()), rows_of_buckets.row, open, s);
  }
  __device__ __forceinline__ void look_up_members(const BucketMap& map, int i, uint32_t open, Acc (&s)[kRows]) const {
    const int pitch = plan.lookup_pitch[i];
    const T* staged = lookups(i) + lane_index() * pitch;
    look_up<T>(map, pitch ? staged : row(lookup_rows(params, i), member0 + lane_index()), 0, open, s);
  }
  // s: products of query and key -> scores
  __device__ __forceinline__ void add_encodings(uint32_t open, Acc (&s)[kRows]) const {
    const Acc scale = static_cast<Acc>(params.scale);
#pragma unroll
    for (int r = 0; r < kRows; ++r) s[r] *= scale;
    if (kOwnsQueries) {
      if (params.index_k.buckets) look_up_own(params.index_k, params.query_rows, open, s);
      if (params.index_q.buckets) look_up_members(params.index_q, 0, open, s);
    } else {
      if (params.index_k.buckets) look_up_members(params.index_k, 0, open, s);
      if (params.index_q.buckets) look_up_own(params.index_q, params.key_rows, open, s);
    }
    if (params.index_t.buckets) {
      look_up(params.index_t, static_cast<const Acc*>(params.table) + head() * params.index_t.buckets, 0, open, s);
    }
  }

  // Lets add_to_bins see the lanes' numbers of their pairs.
  __device__ __forceinline__ void share(const Acc (&x)[kRows]) const {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) weights()[r * kPairPitch + lane_index()] = x[r];
    __syncwarp();
  }
  // Adds the shared weights to the bins of a map whose buckets follow `before` others.
  __device__ __forceinline__ void add_to_bins(const BucketMap& map, int64_t before) const {
    const int lane = lane_index(), place = lane / kBinLanes * kPairPitch + lane % kBinLanes;
    const uint32_t shift = static_cast<uint32_t>(before - range().first), count = static_cast<uint32_t>(range().count);
    Acc* to = bins() + lane;
#pragma unroll 1
    for (int64_t term = 0; term < map.terms; ++term) {
      int32_t bucket[kRows];
      fetch(term_of(map, term), bucket);
      if (kOwnsQueries) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) index()[r * kPairPitch + lane] = bucket[r];
        __syncwarp();
      }
      // All loads first: additions to bins wait for each other.
      uint32_t bin[kWarp / kBinLanes];
      Acc weight[kWarp / kBinLanes];
#pragma unroll
      for (int i = 0; i < kWarp / kBinLanes; ++i) {
        const int k = place + i * kBinLanes;
        const uint32_t c = static_cast<uint32_t>(index()[k]);
        const bool known = c < map.buckets;
        bin[i] = (known ? c : 0) + shift;
        weight[i] = known ? weights()[k] : kNaN<Acc>;
      }
#pragma unroll
      for (int i = 0; i < kWarp / kBinLanes; ++i) {
        if (bin[i] < count) to[bin[i] * kWarp] += weight[i];
      }
      __syncwarp();
    }
  }
};

}  // namespace natrpb::cuda::irpe
