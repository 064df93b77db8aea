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
  S* row(const Matrix& m, int64_t pair, int64_t i) const {
    return static_cast<S*>(m.data) + m.offset(pair / params.heads, pair % params.heads, i);
  }

  void forward(int64_t item, T* entries) const {
    const int64_t pair = item / row_blocks(), begin = item % row_blocks() * kIndexRows, buckets = params.index.buckets;
    with_lookup<T>(buckets, [&](auto count) NATRPB_LAMBDA {
      for (int64_t i = begin; i < min_of(begin + kIndexRows, params.queries); ++i) {
        const S* x = row(params.x, pair, i);
        for (int64_t c = 0; c < row_pitch<T>(buckets); c += L) {
          store(entries + c, c < buckets ? load_channels<T>(x + c, buckets - c) : Vec<T>{});
        }
        const RowLookup<T, decltype(count)::value> lookup(entries);
        const int32_t* index = params.index.data + i * params.keys;
        S* y = row(params.y, pair, i);
        int64_t j = 0;
        for (; j + L <= params.keys; j += L) store_as(y + j, lookup(load_narrow<T>(index + j, L)));
        const int64_t left = params.keys - j;
        if (left) store_part<T>(y + j, lookup(load_narrow<T>(index + j, left)), left);
      }
    });
  }

  void transposed(int64_t item, T* bins) const {
    const int64_t first = item / row_blocks() * L, begin = item % row_blocks() * kIndexRows;
    const int64_t end = min_of(begin + kIndexRows, params.queries);
    int64_t i = begin;
    for (; i + 2 <= end; i += 2) transposed_rows<2>(first, i, bins);
    if (i < end) transposed_rows<1>(first, i, bins);
  }

  // x[pair l][i][c] = bins[c][l] = sum of y[pair l][i][j] over the j with index[i][j] = c, for ROWS neighboring i. Two rows in turn
  // do not wait for each other's additions, where neighboring keys fall into one bin.
  template <int ROWS>
  void transposed_rows(int64_t first, int64_t i, T* bins) const {
    const int64_t last = min_of(L, pairs() - first) - 1, buckets = params.index.buckets;
    S *x[L], *y[L];  // NB: lanes beyond the last pair read it again, and write nothing
    for (int64_t l = 0; l < L; ++l) {
      x[l] = row(params.x, first + min_of(l, last), i);
      y[l] = row(params.y, first + min_of(l, last), i);
    }
    clear(bins, ROWS * buckets * L);
    const int32_t* index = params.index.data + i * params.keys;
    alignas(kVectorBytes) T block[ROWS][L * L];  // [row][j][pair]
    for (int64_t j = 0; j < params.keys; j += L) {
      const int64_t left = params.keys - j;
      unroll<ROWS>([&](auto r) NATRPB_LAMBDA {
        constexpr int n = decltype(r)::value;
        left >= L ? load_block<true>(y, n * params.y.row + j, L, block[n])
                  : load_block<false>(y, n * params.y.row + j, left, block[n]);
      });
      for (int64_t k = 0; k < min_of(left, L); ++k) {
        unroll<ROWS>([&](auto r) NATRPB_LAMBDA {
          constexpr int n = decltype(r)::value;
          T* bin = bins + (n * buckets + index[n * params.keys + j + k]) * L;
          store(bin, load(bin) + load(block[n] + k * L));
        });
      }
    }
    unroll<ROWS>([&](auto r) NATRPB_LAMBDA {
      store_bins(bins + decltype(r)::value * buckets * L, x, decltype(r)::value * params.x.row, last);
    });
  }

  // block[j][l] = rows[l][offset + j], j < left
  template <bool WHOLE>
  static NATRPB_INLINE void load_block(S* const* rows, int64_t offset, int64_t left, T* block) {
    Vec<T> tile[L];
    unroll<L>([&](auto l) NATRPB_LAMBDA {
      const S* from = rows[decltype(l)::value] + offset;
      tile[decltype(l)::value] = WHOLE ? load_as<T>(from) : load_part<T>(from, left);
    });
    transpose<T>(tile);
    unroll<L>([&](auto j) NATRPB_LAMBDA { store(block + decltype(j)::value * L, tile[decltype(j)::value]); });
  }

  // rows[l][offset + c] = bins[c][l], l <= last
  void store_bins(const T* bins, S* const* rows, int64_t offset, int64_t last) const {
    for (int64_t c = 0; c < params.index.buckets; c += L) {
      const int64_t left = params.index.buckets - c;
      Vec<T> tile[L];
      unroll<L>([&](auto k)
                    NATRPB_LAMBDA { tile[decltype(k)::value] = load(bins + (c + min_of(decltype(k)::value, left - 1)) * L); });
      transpose<T>(tile);
      for (int64_t l = 0; l <= last; ++l) {
        S* to = rows[l] + offset + c;
        left >= L ? store_as(to, tile[l]) : store_part<T>(to, tile[l], left);
      }
    }
  }
};
