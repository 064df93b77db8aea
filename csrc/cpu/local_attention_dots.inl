// Scores of few slots: lanes are channels, of queries and keys as they lie, and the lanes of a product's sum meet at the end. That
// takes two shuffles per score, whatever the number of channels; transposed keys take one per score and channel, and must be
// transposed first, which pays where many slots share them.

// A tile is up to kLanes scores: kDotQueries neighboring lanes of a block by up to kDotSlots slots of a key row.
template <class T>
inline constexpr int kDotQueries = kLanes<T> < 4 ? kLanes<T> : 4;
template <class T>
inline constexpr int kDotSlots = kLanes<T> / kDotQueries<T>;

// Where the lanes of a block lie: a row of queries, and its keys counted from the first one of any key row.
template <class T>
struct DotLanes {
  const T* query[kLanes<T>];
  int64_t key[kLanes<T>];                        // of a lane's first slot
  bool consecutive[kLanes<T> / kDotQueries<T>];  // whether the keys of a tile's lanes begin a column further each
};

template <class T>
DotLanes<T> dot_lanes(const Block<T>& block, const T* query, Steps steps, int64_t key_step) {
  constexpr int kQueries = kDotQueries<T>;
  DotLanes<T> lanes;
  for (int l = 0; l < kLanes<T>; ++l) {
    lanes.query[l] = query + steps(min_of(l, block.live - 1));
    lanes.key[l] = block.first[l] * key_step;
  }
  for (int g = 0; g < kLanes<T> / kQueries; ++g) {
    lanes.consecutive[g] = true;
    for (int i = 1; i < kQueries; ++i) {
      lanes.consecutive[g] &= block.first[g * kQueries + i] == block.first[g * kQueries] + i;
    }
  }
  return lanes;
}

// Lane t kDotQueries + i: <query[i], key + at[i] + t step>, t < SLOTS
template <class T, int SLOTS, bool CONSECUTIVE>
NATRPB_INLINE Vec<T> dot_tile(const T* const* query, const T* key, const int64_t* at, int64_t step, int64_t channels) {
  constexpr int L = kLanes<T>, kQueries = kDotQueries<T>;
  Vec<T> acc[L] = {};
  for (int64_t c = 0; c < channels; c += L) {
    Vec<T> q[kQueries];
    NATRPB_UNROLL for (int i = 0; i < kQueries; ++i) q[i] = load(query[i] + c);
    if constexpr (CONSECUTIVE) {
      const T* column = key + at[0] + c;
      NATRPB_UNROLL for (int j = 0; j < kQueries + SLOTS - 1; ++j, column += step) {
        const Vec<T> k = in_register(load(column));
        NATRPB_UNROLL for (int i = 0; i < kQueries; ++i) {
          if (i <= j && j < i + SLOTS) acc[(j - i) * kQueries + i] += q[i] * k;
        }
      }
    } else {
      NATRPB_UNROLL for (int t = 0; t < SLOTS; ++t) {
        NATRPB_UNROLL for (int i = 0; i < kQueries; ++i) acc[t * kQueries + i] += q[i] * load(key + at[i] + t * step + c);
      }
    }
  }
  return sums_of<T>(acc);
}

// to[slot][lane] = bias + scale <query, key> for SLOTS slots of a key row; `bias` is the first one's entry for the block, or null.
template <class T, int SLOTS>
void dot_slots(const Block<T>& block, const DotLanes<T>& lanes, const T* key, int64_t step, int64_t channels, T scale,
               const T* bias, T* to) {
  constexpr int L = kLanes<T>, kQueries = kDotQueries<T>;
  Vec<T> scores[L / kQueries] = {};
  for (int g = 0; g * kQueries < block.live; ++g) {
    const T* const* query = lanes.query + g * kQueries;
    const int64_t* at = lanes.key + g * kQueries;
    scores[g] = lanes.consecutive[g] ? dot_tile<T, SLOTS, true>(query, key, at, step, channels)
                                     : dot_tile<T, SLOTS, false>(query, key, at, step, channels);
  }
  transpose_runs<T, kQueries>(scores);
  NATRPB_UNROLL for (int t = 0; t < SLOTS; ++t) {
    const Vec<T> before = bias ? load_lanes<T, Reach::kWithin>(bias + t, block.bias_lanes) : Vec<T>{};
    store(to + t * L, before + scale * scores[t]);
  }
}

// ... for all `slots` of a key row. NB: the last tile begins earlier where fewer are left, lest it read keys that there are not.
template <class T>
void dot_scores(const Block<T>& block, const DotLanes<T>& lanes, const T* key, int64_t step, int64_t channels, int64_t slots,
                T scale, const T* bias, T* to) {
  const int64_t most = min_of(kDotSlots<T>, slots);
  for (int64_t t = 0; t < slots; t += most) {
    const int64_t slot = min_of(t, slots - most);
    unroll<kDotSlots<T>>([&](auto n) NATRPB_LAMBDA {
      constexpr int kSlots = decltype(n)::value + 1;
      if (most != kSlots) return;
      dot_slots<T, kSlots>(block, lanes, key + slot * step, step, channels, scale, bias ? bias + slot : nullptr,
                           to + slot * kLanes<T>);
    });
  }
}
