// What becomes of a block's scores [slot][lane] between the products: missing slots, softmax and its gradient, lanes that leave as
// rows of slots, and lanes that meet in a bias table.

// Sets the slots without a key to `fill`, so that loops over all slots need no conditions.
template <class T>
void fill_missing(const Block<T>& block, const KeyRows& rows, const Kernel& kernel, T fill, T* p) {
  constexpr int L = kLanes<T>;
  const int64_t k2 = kernel.size2;
  const bool all_rows = rows.axis0.count() == kernel.size0 && rows.axis1.count() == kernel.size1;
  if (all_rows && block.least == k2) return;
  const Vec<T> filler = splat(fill);
  for (int64_t t0 = 0; t0 < kernel.size0; ++t0) {
    for (int64_t t1 = 0; t1 < kernel.size1; ++t1) {
      T* row = p + (t0 * kernel.size1 + t1) * k2 * L;
      const bool row_exists = t0 < rows.axis0.count() && t1 < rows.axis1.count();
      for (int64_t t2 = row_exists ? block.least : 0; t2 < k2; ++t2) {
        const auto exists = block.counts > static_cast<CountOf<T>>(row_exists ? t2 : k2);
        store(row + t2 * L, exists ? load(row + t2 * L) : filler);
      }
    }
  }
}

template <class T>
struct Softmax {
  Vec<T> peak;  // what was subtracted from the scores
  Vec<T> sum;   // of the exponentials
};

#ifdef NATRPB_BF16_PRODUCTS
// to[key row][word][lane]: a lane's weights of the columns 2 w and 2 w + 1, counted from the even column at or before its first;
// zero for the columns at both ends that it does not see.
inline void pack_weights(const float* p, const Block<float>& block, const Kernel& kernel, float* to) {
  constexpr int L = kLanes<float>;
  const auto odd = ((block.key_lanes.offset + static_cast<int32_t>(block.first[0])) & 1) != 0;
  const int64_t k2 = kernel.size2;
  for (int64_t row = 0; row < kernel.size0 * kernel.size1; ++row) {
    Vec<float> before{};
    for (int64_t t = 0; t <= k2; t += 2, to += L) {
      const Vec<float> low = t < k2 ? load(p + t * L) : Vec<float>{};
      const Vec<float> high = t + 1 < k2 ? load(p + (t + 1) * L) : Vec<float>{};
      store(to, pair_up(odd ? before : low, odd ? low : high));
      before = high;
    }
    p += k2 * L;
  }
}

// Of scores [key][pitch]: to[key / 2][pitch] = the pair (p[key][query], p[key + 1][query]), zero behind the last key.
inline void pair_keys(const float* p, int64_t pitch, int64_t keys, int64_t queries, float* to) {
  constexpr int L = kLanes<float>;
  for (int64_t k = 0; k < keys; k += 2, p += 2 * pitch, to += pitch) {
    for (int64_t q = 0; q < queries; q += L) {
      store(to + q, pair_up(load(p + q), k + 1 < keys ? load(p + pitch + q) : Vec<float>{}));
    }
  }
}
// to[key][pitch / 2, in whole vectors] = the pair (p[key][query], p[key][query + 1]), zero behind the last query: there an infinite key
// leaves NaN.
inline void pair_queries(const float* p, int64_t pitch, int64_t keys, int64_t queries, float* to) {
  constexpr int L = kLanes<float>;
  const auto live = [&](int64_t key, int64_t q) NATRPB_LAMBDA {
    return lane_numbers<float>() < static_cast<CountOf<float>>(queries - q) ? load(p + key * pitch + q) : Vec<float>{};
  };
  for (int64_t k = 0; k < keys; ++k) {
    float* row = to + k * ceil_div(pitch, 2 * L) * L;
    for (int64_t q = 0; q < queries; q += 2 * L, row += L) {
      store(row, pair_neighbors(live(k, q), q + L < queries ? live(k, q + L) : Vec<float>{}));
    }
  }
}
#endif

// scores p[slot * step + lane] -> exp(score - peak)
template <class T>
NATRPB_INLINE Softmax<T> exponentiate(T* p, int64_t slots, int64_t step = kLanes<T>) {
  Vec<T> peaks[4] = {load(p), load(p), load(p), load(p)};  // four chains hide the latency of the maximum
  int64_t t = 0;
  for (; t + 4 <= slots; t += 4) {
    NATRPB_UNROLL for (int i = 0; i < 4; ++i) peaks[i] = max<T>(peaks[i], load(p + (t + i) * step));
  }
  for (; t < slots; ++t) peaks[0] = max<T>(peaks[0], load(p + t * step));
  const Vec<T> largest = max<T>(max<T>(peaks[0], peaks[1]), max<T>(peaks[2], peaks[3]));
  const Vec<T> peak = largest - largest == T(0) ? largest : Vec<T>{};  // infinite scores: inf - inf would lose lse
  Vec<T> sum{};
  for (t = 0; t < slots; ++t) {
    const Vec<T> e = exp<T>(load(p + t * step) - peak);
    store(p + t * step, e);
    sum += e;
  }
  return {peak, sum};
}

// p: scores -> weights exp(s - lse);  dp: d weights -> d scores p * (dp - sum p dp + dlse)
template <class T>
NATRPB_INLINE void differentiate_softmax(Vec<T> lse, Vec<T> dlse, int64_t slots, T* p, T* dp, int64_t step = kLanes<T>) {
  Vec<T> delta{};
  for (int64_t t = 0; t < slots; ++t) {
    const Vec<T> weight = exp<T>(load(p + t * step) - lse);
    store(p + t * step, weight);
    delta += weight * load(dp + t * step);
  }
  delta -= dlse;
  for (int64_t t = 0; t < slots; ++t) store(dp + t * step, load(p + t * step) * (load(dp + t * step) - delta));
}

// to[lane][slot] = p[slot][lane]
template <class T, class S>
void copy_slots(const T* p, int64_t slots, S* to, Steps steps, int live) {
  constexpr int L = kLanes<T>;
  for (int64_t t = 0; t < slots; t += L) {
    Vec<T> tile[L] = {};
    const int64_t n = min_of(L, slots - t);
    for (int64_t i = 0; i < n; ++i) tile[i] = load(p + (t + i) * L);
    transpose<T>(tile);
    for (int l = 0; l < live; ++l) {
      S* row = to + steps(l) + t;
      n == L ? store_as(row, tile[l]) : store_part<T>(row, tile[l], n);
    }
  }
}

// Adds lanes [slot of one key row][lane] to a bias table's row of `entries`: lane l's slot t belongs to entry bias_first[l] + t, and
// where the block folds, that of a lane of the second query row to the same entry of the row before, if there is one.
template <class T>
void add_lanes(const Block<T>& block, const T* lanes, int64_t slots, int64_t entries, T* row, bool has_row_before) {
  constexpr int L = kLanes<T>;
  const Index<T> place = lane_numbers<T>();
  for (int64_t t = 0; t < slots; t += L) {
    Vec<T> slots_of[L] = {};
    for (int64_t i = 0; i < min_of(L, slots - t); ++i) slots_of[i] = load(lanes + (t + i) * L);
    transpose<T>(slots_of);
    for (int f = 0; f < block.fold && f <= has_row_before; ++f) {
      Vec<T> sums[2] = {};  // a lane's slots span two vectors from bias_base + t on
      for (int64_t l = f * block.width; l < (f + 1) * block.width; ++l) {
        const Vec<T> real = place < static_cast<CountOf<T>>(block.count[l] - t) ? slots_of[l] : Vec<T>{};
        const CountOf<T> offset = block.bias_lanes.offset[l];
        const Vec<T> turned = offset ? permute<T>(real, (place - offset) & (L - 1)) : real;
        sums[0] += place >= offset ? turned : Vec<T>{};
        sums[1] += place < offset ? turned : Vec<T>{};
      }
      const int64_t first = block.bias_base + t;
      add_row(reinterpret_cast<const T*>(sums), min_of(2 * L, entries - first), splat(T(1)), row - f * entries + first);
    }
  }
}
