// rpe_index and its transpose.
//
//   forward     an item is up to kIndexRows rows of one (batch, head); every row is a lookup
//   transposed  an item is up to kIndexRows rows of kLanes (batch, head) pairs, one in each lane: all of them add to the bin of the
//               same index, so that a vector addition serves them together. Rows are transposed on the way, block by block.
//
// Bytes: x or y read once, the other written once; the index map once per (batch, head), or per kLanes of them.

inline constexpr int64_t kIndexRows = 16;

template <class S>
struct RpeIndex {
  using T = Compute<S>;
  static constexpr int L = kLanes<T>;

  const RpeIndexParams& params;

  int64_t pairs() const { return params.batch * params.heads; }
  int64_t row_blocks() const { return ceil_div(params.queries, kIndexRows); }
  int64_t items(bool transposed) const { return (transposed ? ceil_div(pairs(), L) : pairs()) * row_blocks(); }
  int64_t scratch(bool transposed) const {
    return (transposed ? 2 * params.index.buckets * L : row_pitch<T>(params.index.buckets)) * static_cast<int64_t>(sizeof(T));
  }
  // The first row of a pair.
  S* start(const RowsView& m, int64_t pair) const {
    return static_cast<S*>(m.data) + m.offset(pair / params.heads, pair % params.heads, 0);
  }

  void forward(int64_t item, T* entries) const {
    const int64_t pair = item / row_blocks(), begin = item % row_blocks() * kIndexRows, buckets = params.index.buckets;
    const S* first_x = start(params.x, pair);
    S* first_y = start(params.y, pair);
    with_lookup<T>(buckets, [&](auto count) NATRPB_LAMBDA {
      for (int64_t i = begin; i < min_of(begin + kIndexRows, params.queries); ++i) {
        const S* x = first_x + i * params.x.row;
        for (int64_t c = 0; c < row_pitch<T>(buckets); c += L) {
          store(entries + c, c < buckets ? load_channels<T>(x + c, buckets - c) : Vec<T>{});
        }
        const RowLookup<T, decltype(count)::value> lookup(entries);
        const int32_t* index = params.index.data + i * params.keys;
        S* y = first_y + i * params.y.row;
        int64_t j = 0;
        for (; j + L <= params.keys; j += L) store_as(y + j, lookup(load_narrow<T>(index + j, L)));
        const int64_t left = params.keys - j;
        if (left) store_part<T>(y + j, lookup(load_narrow<T>(index + j, left)), left);
      }
    });
  }

  // Rows of kLanes pairs. NB: lanes beyond the last pair read it again, and write nothing.
  struct Lanes {
    S *x[L], *y[L];
    int64_t last;
  };

  void transposed(int64_t item, T* bins) const {
    const int64_t first = item / row_blocks() * L, begin = item % row_blocks() * kIndexRows;
    const int64_t end = min_of(begin + kIndexRows, params.queries);
    Lanes lanes;
    lanes.last = min_of(L, pairs() - first) - 1;
    for (int64_t l = 0; l < L; ++l) {
      lanes.x[l] = start(params.x, first + min_of(l, lanes.last));
      lanes.y[l] = start(params.y, first + min_of(l, lanes.last));
    }
    int64_t i = begin;
    for (; i + 2 <= end; i += 2) transposed_rows<2>(lanes, i, bins);
    if (i < end) transposed_rows<1>(lanes, i, bins);
  }

  // x[pair l][i][c] = bins[c][l] = sum of y[pair l][i][j] over the j with index[i][j] = c, for ROWS neighboring i. Two rows in turn
  // do not wait for each other's additions, where neighboring keys fall into one bin.
  template <int ROWS>
  void transposed_rows(const Lanes& lanes, int64_t i, T* bins) const {
    const int64_t buckets = params.index.buckets;
    clear(bins, ROWS * buckets * L);
    const int32_t* index = params.index.data + i * params.keys;
    int64_t j = 0;
    for (; j + L <= params.keys; j += L) add_block<ROWS, true>(lanes, i, j, index + j, bins);
    if (j < params.keys) add_block<ROWS, false>(lanes, i, j, index + j, bins);
    for (int r = 0; r < ROWS; ++r) store_bins(bins + r * buckets * L, lanes.x, (i + r) * params.x.row, lanes.last);
  }

  // The columns j .. of rows i .., at most L of them, added to their bins.
  template <int ROWS, bool WHOLE>
  NATRPB_INLINE void add_block(const Lanes& lanes, int64_t i, int64_t j, const int32_t* index, T* bins) const {
    const int64_t count = WHOLE ? L : params.keys - j;
    const int64_t row_bins = params.index.buckets * L, row_index = params.keys;
    NATRPB_UNROLL for (int r = 0; r < ROWS; ++r) {
      Vec<T> tile[L];
      const int64_t offset = (i + r) * params.y.row + j;
      NATRPB_UNROLL for (int l = 0; l < L; ++l) {
        const S* from = lanes.y[l] + offset;
        __builtin_prefetch(from + 3 * L);  // as many rows at once are more than hardware follows
        tile[l] = WHOLE ? load_as<T>(from) : load_part<T>(from, count);
      }
      transpose<T>(tile);
      NATRPB_UNROLL for (int k = 0; k < L; ++k) {
        if (!WHOLE && k >= count) continue;
        T* bin = bins + r * row_bins + index[r * row_index + k] * int64_t{L};
        store(bin, load(bin) + tile[k]);
      }
    }
  }

  // rows[l][offset + c] = bins[c][l], l <= last
  void store_bins(const T* bins, S* const* rows, int64_t offset, int64_t last) const {
    for (int64_t c = 0; c < params.index.buckets; c += L) {
      const int64_t left = params.index.buckets - c;
      Vec<T> tile[L];
      NATRPB_UNROLL for (int k = 0; k < L; ++k) tile[k] = load(bins + (c + min_of(k, left - 1)) * L);
      transpose<T>(tile);
      NATRPB_UNROLL for (int l = 0; l < L; ++l) {
        if (l > last) continue;
        S* to = rows[l] + offset + c;
        left >= L ? store_as(to, tile[l]) : store_part<T>(to, tile[l], left);
      }
    }
  }
};
