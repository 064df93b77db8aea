// What the register tiles of local attention walk along: the lanes of a block and where they reach, the key rows of query rows, and
// the words of a key row.

// How the lanes of a block reach into a row of memory: lane l reads p[offset[l]], 0 <= offset[l] < kLanes.
// Where a vector's boundary is known, two aligned loads serve all slots: kAligned is kConsecutive with p on a boundary, kAcross
// any reach into the two vectors that p's own begins. A load that crosses cache lines takes the time of two.
enum class Reach { kConsecutive, kSame, kWithin, kAligned, kAcross };  // offset[l] = l; all 0; any; l; any

template <class T>
struct LaneMap {
  Reach reach;
  int64_t furthest;  // the largest offset
  Index<T> offset;
};

template <class T>
NATRPB_INLINE LaneMap<T> map_lanes(const int64_t* position, int64_t base, int64_t live) {
  CountOf<T> offset[kLanes<T>];
  bool consecutive = true, same = true;
  for (int l = 0; l < kLanes<T>; ++l) {
    offset[l] = static_cast<CountOf<T>>(position[l] - base);
    consecutive &= (l >= live) | (offset[l] == l);
    same &= offset[l] == 0;
  }
  LaneMap<T> map;
  map.furthest = 0;
  for (int l = 0; l < kLanes<T>; ++l) map.furthest = max_of(map.furthest, position[l] - base);
  map.reach = same ? Reach::kSame : consecutive ? Reach::kConsecutive : Reach::kWithin;
  __builtin_memcpy(&map.offset, offset, sizeof offset);
  return map;
}

template <class T, Reach R>
NATRPB_INLINE Vec<T> load_lanes(const T* p, const LaneMap<T>& map) {
  if constexpr (R == Reach::kConsecutive) {
    return load(p);
  } else if constexpr (R == Reach::kSame) {
    return splat(*p);
  } else {
    return permute<T>(load(p), map.offset);
  }
}

// The axis-2 side of a block: live lanes and, per lane, the interval of key columns relative to the box's first key.
template <class T>
struct Block {
  int64_t column;            // first query, in-group
  int64_t width;             // columns
  int fold;                  // query rows: the lanes of the second one follow those of the first
  int live;                  // lanes in use
  int64_t first[kLanes<T>];  // NB: lanes beyond live repeat the last live one
  int64_t count[kLanes<T>];
  int64_t least;          // the smallest count
  Index<T> counts;        // count, as a vector
  LaneMap<T> key_lanes;   // from first[0]
  LaneMap<T> bias_lanes;  // from bias_base
  int64_t bias_base;
  int64_t bias_first[kLanes<T>];  // table column of every lane's slot 0

  int64_t row(int64_t p1, int64_t tile) const { return p1 + tile * fold; }  // first query row of a tile's r-th block
};

// Whether a whole vector of queries from `column` on sees K keys each, a column further from query to query: most blocks, found by
// their ends. NB: without strides first keys never move by more than one.
template <int L>
NATRPB_INLINE bool has_steady_lanes(const Axis& axis, const Interval& first, int64_t column, int64_t end, int64_t size) {
  if (axis.kind == AxisKind::kWindow || axis.stride != 1 || column + L > end) return false;
  return first.count() == axis.kernel_size && axis.keys(column + L - 1, size).first == first.first + L - 1;
}

// The block at query `column` of a group of `size` positions, for queries before `end` and keys from `key_lo` on, over `fold` rows
// of queries, whose columns must all fit. Windows and strides make first columns jump: a block ends before they spread over more than one vector. Table columns then fit one too,
// since bias_first = first - p + K - 1 moves by less than first does.
template <class T>
Block<T> make_block(const Axis& axis, int64_t column, int64_t end, int64_t size, int64_t key_lo, int fold) {
  constexpr int L = kLanes<T>;
  Block<T> block;
  block.column = column;
  block.fold = fold;
  block.least = axis.kernel_size;
  block.bias_base = 2 * axis.kernel_size;
  if (const Interval first = axis.keys(column, size); has_steady_lanes<L>(axis, first, column, end, size)) {
    block.width = block.live = L;
    block.bias_base = axis.bias_index(column, first.first);
    for (int l = 0; l < L; ++l) {
      block.first[l] = first.first - key_lo + l;
      block.count[l] = axis.kernel_size;
      block.bias_first[l] = block.bias_base;
    }
    block.counts = Index<T>{} + static_cast<CountOf<T>>(axis.kernel_size);
    block.key_lanes = {Reach::kConsecutive, L - 1, lane_numbers<T>()};
    block.bias_lanes = {Reach::kSame, 0, Index<T>{}};
    return block;
  }
  int width = 0;
  for (int64_t p = column; width < L && p < end; ++width, ++p) {
    const Interval keys = axis.keys(p, size);
    block.first[width] = keys.first - key_lo;
    if (block.first[width] - block.first[0] >= L) break;
    block.count[width] = keys.count();
    block.bias_first[width] = axis.bias_index(p, keys.first);
    block.least = min_of(block.least, block.count[width]);
    block.bias_base = min_of(block.bias_base, block.bias_first[width]);
  }
  block.width = width;
  block.live = width * fold;
  for (int l = width; l < L; ++l) {
    const int like = l < block.live ? l - width : width - 1;
    block.first[l] = block.first[like];
    block.count[l] = block.count[like];
    block.bias_first[l] = block.bias_first[like];
  }
  CountOf<T> counts[L];
  for (int l = 0; l < L; ++l) counts[l] = static_cast<CountOf<T>>(block.count[l]);
  __builtin_memcpy(&block.counts, counts, sizeof counts);
  block.key_lanes = map_lanes<T>(block.first, block.first[0], block.live);
  block.bias_lanes = map_lanes<T>(block.bias_first, block.bias_base, block.live);
  return block;
}

// How a score tile of `slots` slots reads its keys, the first of which is `past` elements behind a vector's boundary.
template <class T>
Reach key_reach(const Block<T>& block, int64_t past, int64_t slots) {
  const LaneMap<T>& lanes = block.key_lanes;
  if (!kTakesFromTwo || lanes.reach == Reach::kSame) return lanes.reach;
  if (lanes.reach == Reach::kConsecutive && block.live == kLanes<T> && past == 0) return Reach::kAligned;
  return past + lanes.furthest + slots <= 2 * kLanes<T> ? Reach::kAcross : lanes.reach;
}

struct Kernel {
  int64_t size0, size1, size2;  // K_0, K_1, K_2
};

// The rows (axes 0 and 1) of keys that a query row sees, relative to the box's first key.
struct KeyRows {
  Interval axis0;
  Interval axis1;
};

// Rows of channels, one per key of the item's box: a copy in scratch memory, or the caller's tensor itself.
template <class T>
struct Rows {
  T* data;
  int64_t step[kAxes];  // elements from key to key along each axis
  int64_t channels;     // a multiple of kLanes

  NATRPB_INLINE T* at(int64_t k0, int64_t k1, int64_t k2) const { return data + k0 * step[0] + k1 * step[1] + k2 * step[2]; }
};

// Slots of k0 planes and k1 rows of a kernel.
NATRPB_INLINE int64_t slots_of(const Kernel& kernel, int64_t k0, int64_t k1) { return (k0 * kernel.size1 + k1) * kernel.size2; }
// First slot of key row (k0, k1): what it is for row (0, 0), which need not exist, plus slots_of(kernel, k0, k1).
NATRPB_INLINE int64_t first_slot(const KeyRows& rows, const Kernel& kernel, int64_t k0, int64_t k1) {
  return slots_of(kernel, k0 - rows.axis0.first, k1 - rows.axis1.first);
}

// Calls row(first slot of the key row, k0, k1) for every key row that a query row sees.
template <class F>
NATRPB_INLINE void for_rows(const KeyRows& rows, const Kernel& kernel, F&& row) {
  for (int64_t k0 = rows.axis0.first; k0 <= rows.axis0.last; ++k0) {
    for (int64_t k1 = rows.axis1.first; k1 <= rows.axis1.last; ++k1) {
      row(first_slot(rows, kernel, k0, k1), k0, k1);
    }
  }
}

// Calls row(k0, k1, begin, end) for every key row that any of `count` query rows sees, and those that see it: begin .. end - 1.
template <class F>
NATRPB_INLINE void for_shared_rows(const KeyRows* rows, int count, F&& row) {
  for (int64_t k0 = rows[0].axis0.first; k0 <= rows[0].axis0.last; ++k0) {
    int begin = 0, end = 0;  // both only grow
    for (int64_t k1 = rows[0].axis1.first; k1 <= rows[count - 1].axis1.last; ++k1) {
      while (end < count && rows[end].axis1.first <= k1) ++end;
      while (begin < end && rows[begin].axis1.last < k1) ++begin;
      if (begin < end) row(k0, k1, begin, end);
    }
  }
}

// The word of a key row that a query's interval begins in, counted from the first query's. A word is WIDTH neighboring columns; the
// first query begins ODD columns behind the first of its word, each further one a column later.
template <int WIDTH, int ODD, int QUERY>
inline constexpr int kStart = (QUERY + ODD) / WIDTH;

// Walks QUERIES neighboring lanes and the words of one key row:
//   word(meets)              is called once per word, from lane 0's first on, and runs
//   meets(visit)             for every query i that sees it, visit(Const<i>, place of the word among those of the query)
// kConsecutive (first_i = first_0 + i, all of `count` words, at least the start of the last query): fewer queries meet at both
// ends, all of them between. kSame: all intervals are one.
template <int QUERIES, Reach R, int WIDTH = 1, int ODD = 0, class F>
NATRPB_INLINE void for_words(int64_t count, F&& word) {
  if constexpr (R == Reach::kConsecutive) {
    constexpr int kLast = kStart<WIDTH, ODD, QUERIES - 1>;
    unroll<kLast>([&](auto j) NATRPB_LAMBDA {
      word([&](auto&& visit) NATRPB_LAMBDA {
        unroll<QUERIES>([&](auto i) NATRPB_LAMBDA {
          constexpr int start = kStart<WIDTH, ODD, decltype(i)::value>, at = decltype(j)::value;
          if constexpr (start <= at) visit(i, int64_t{at - start});
        });
      });
    });
    for (int64_t j = kLast; j < count; ++j) {
      word([&](auto&& visit) NATRPB_LAMBDA {
        unroll<QUERIES>([&](auto i) NATRPB_LAMBDA { visit(i, j - kStart<WIDTH, ODD, decltype(i)::value>); });
      });
    }
    unroll<kLast>([&](auto j) NATRPB_LAMBDA {
      word([&](auto&& visit) NATRPB_LAMBDA {
        unroll<QUERIES>([&](auto i) NATRPB_LAMBDA {
          constexpr int start = kStart<WIDTH, ODD, decltype(i)::value>, at = decltype(j)::value;
          if constexpr (start > at) visit(i, count + at - start);
        });
      });
    });
  } else {
    static_assert(R == Reach::kSame || QUERIES == 1);
    for (int64_t t = 0; t < count; ++t) {
      word([&](auto&& visit) NATRPB_LAMBDA { unroll<QUERIES>([&](auto i) NATRPB_LAMBDA { visit(i, t); }); });
    }
  }
}

// Calls tile(Const<queries>, Const<reach>, lane) for groups of up to MOST neighboring lanes that for_words can walk.
template <int MOST, class T, class F>
NATRPB_INLINE void for_lane_groups(const Block<T>& block, int64_t kernel_size, F&& tile) {
  constexpr int kMost = kLanes<T> < MOST ? kLanes<T> : MOST, kHalf = kMost / 2;
  constexpr Const<static_cast<int>(Reach::kConsecutive)> consecutive;
  constexpr Const<static_cast<int>(Reach::kSame)> same;
  for (int64_t lane = 0; lane < block.live;) {
    const int64_t left = min_of(kMost, (lane < block.width ? block.width : block.live) - lane);  // of one query row
    int64_t steady = 0, equal = 0;  // lanes from `lane` on whose intervals move by one, or stay
    while (steady < left && block.first[lane + steady] == block.first[lane] + steady &&
           block.count[lane + steady] == kernel_size) {
      ++steady;
    }
    while (equal < left && block.first[lane + equal] == block.first[lane] && block.count[lane + equal] == block.count[lane]) {
      ++equal;
    }
    if (steady == kMost && kernel_size >= kMost - 1) {
      tile(Const<kMost>{}, consecutive, lane);
      lane += kMost;
    } else if (kHalf > 1 && steady >= kHalf && kernel_size >= kHalf - 1) {
      tile(Const<kHalf>{}, consecutive, lane);
      lane += kHalf;
    } else {
      unroll<kMost>([&](auto i) NATRPB_LAMBDA {
        if (equal == decltype(i)::value + 1) tile(Const<decltype(i)::value + 1>{}, same, lane);
      });
      lane += equal;
    }
  }
}
