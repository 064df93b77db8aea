// Register tiles of local attention. A block is kLanes queries of one row (consecutive on axis 2); its scores lie in memory as
// [slot][lane], slot = (t_0 * K_1 + t_1) * K_2 + t_2.
//
//   score_tile   lanes are queries, keys are read from transposed rows [channel][column]; R query rows share every key load
//   sum_tile     lanes are channels, out_i = sum_t p_it x_j(i,t); neighboring queries share the loads of x
//   scatter_tile the transpose, dx_j = sum_i p_it(i,j) x_i; neighboring queries of several rows share the loads and
//                stores of dx
//
// Each multiply-add of the op happens in one of the three.

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

// Rows and slots of a score tile: rows * slots accumulators, one query and one key vector must fit the register file.
inline constexpr int kRowTile = NATRPB_VECTOR_BYTES == 64 ? 3 : 2;
inline constexpr int kSlotTile = NATRPB_VECTOR_BYTES == 64 ? 8 : 5;

template <class T>
struct ScoreArgs {
  const T* query;  // [rows][depth][kLanes]
  const T* key;    // key row at the block's base column and the tile's first slot, [depth][pitch]; kAcross: boundary before it
  int64_t past;    // kAcross: how far that column is behind the boundary
  int64_t depth;
  int64_t pitch;
  const LaneMap<T>* key_lanes;
  const LaneMap<T>* bias_lanes;
  // Query row r of the tile: its scores begin at score[score_at + score_start[r]], its table row, at the block's base column and
  // the tile's first slot, at bias[bias_at + bias_start[r]].
  T* score;
  const T* bias;
  int64_t score_at, bias_at;
  const int64_t *score_start, *bias_start;
};

// score[r][t] = bias[r][t] + sum_c query[r][c] * key[c][t], summed in runs of channels: a single long chain of fp32 additions,
// begun from a large bias at that, would err several times more.
template <class T, int ROWS, int SLOTS, Reach R>
void score_tile(const ScoreArgs<T>& args) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kRun = 32;
  const LaneMap<T> lanes = *args.key_lanes, bias_lanes = *args.bias_lanes;
  const int64_t depth = args.depth;
  const T* key = args.key;
  const T* query = args.query;
  [[maybe_unused]] Index<T> place = lanes.offset + static_cast<CountOf<T>>(args.past);
  for (int64_t begin = 0; begin < depth; begin += kRun) {
    Vec<T> acc[ROWS][SLOTS] = {};
    for (int64_t c = min_of(kRun, depth - begin); c > 0; --c, key += args.pitch, query += L) {
      Vec<T> q[ROWS];
      unroll<ROWS>([&](auto r) NATRPB_LAMBDA { q[decltype(r)::value] = load(query + decltype(r)::value * depth * L); });
      [[maybe_unused]] Vec<T> low, high;
      if constexpr (R == Reach::kAligned || R == Reach::kAcross) {
        low = load(key);
        high = load(key + L);
      }
      if constexpr (R == Reach::kAcross)
        place = in_register(place);  // NB: else GCC keeps the places of all slots, and spills them
      unroll<SLOTS>([&](auto t) NATRPB_LAMBDA {
        constexpr int j = decltype(t)::value;
        Vec<T> k;
        if constexpr (R == Reach::kAligned) {
          k = in_register(shift_in<j, T>(low, high));
        } else if constexpr (R == Reach::kAcross) {
          k = in_register(pick<T>(low, place + j, high));
        } else {
          k = in_register(load_lanes<T, R>(key + j, lanes));
        }
        unroll<ROWS>([&](auto r) NATRPB_LAMBDA { acc[decltype(r)::value][j] += q[decltype(r)::value] * k; });
      });
    }
    const auto add_to = [&](auto first) NATRPB_LAMBDA {
      unroll<ROWS>([&](auto r) NATRPB_LAMBDA {
        constexpr int i = decltype(r)::value;
        T* score = args.score + (args.score_at + args.score_start[i]);
        const T* bias = args.bias + (args.bias_at + args.bias_start[i]);
        unroll<SLOTS>([&](auto t) NATRPB_LAMBDA {
          constexpr int j = decltype(t)::value;
          const Vec<T> before =
              decltype(first)::value ? load_lanes<T, Reach::kWithin>(bias + j, bias_lanes) : load(score + j * L);
          store(score + j * L, before + acc[i][j]);
        });
      });
    };
    begin == 0 ? add_to(Const<true>{}) : add_to(Const<false>{});
  }
}

template <class T>
using ScoreTile = void (*)(const ScoreArgs<T>&);

template <class T, Reach R, int... I>
NATRPB_INLINE ScoreTile<T> pick_score_tile(int index, std::integer_sequence<int, I...>) {
  static constexpr ScoreTile<T> tiles[] = {&score_tile<T, I / kSlotTile + 1, I % kSlotTile + 1, R>...};
  return tiles[index];
}
template <class T>
ScoreTile<T> pick_score_tile(int rows, int slots, Reach reach) {
  const int index = (rows - 1) * kSlotTile + slots - 1;
  const auto all = std::make_integer_sequence<int, kRowTile * kSlotTile>{};
  if (reach == Reach::kConsecutive) return pick_score_tile<T, Reach::kConsecutive>(index, all);
  if (reach == Reach::kSame) return pick_score_tile<T, Reach::kSame>(index, all);
  if constexpr (kTakesFromTwo) {
    if (reach == Reach::kAligned) return pick_score_tile<T, Reach::kAligned>(index, all);
    if (reach == Reach::kAcross) return pick_score_tile<T, Reach::kAcross>(index, all);
  }
  return pick_score_tile<T, Reach::kWithin>(index, all);
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

// Walks the pairs of QUERIES neighboring lanes and the columns of one key row:
//   column(meets)            is called once per column, from lane 0's first on, and runs
//   meets(pair)              for every query i that sees it, pair(Const<i>, slot of the column in the query's interval)
// kConsecutive (first_i = first_0 + i, all of kernel_size >= QUERIES - 1 columns): fewer queries meet at both ends, all of them
// between. kSame: all intervals are one.
template <int QUERIES, Reach R, class F>
NATRPB_INLINE void for_columns(int64_t count, F&& column) {
  if constexpr (R == Reach::kConsecutive) {
    unroll<QUERIES - 1>([&](auto j) NATRPB_LAMBDA {
      constexpr int met = decltype(j)::value + 1;
      column([&](auto&& pair)
                 NATRPB_LAMBDA { unroll<met>([&](auto i) NATRPB_LAMBDA { pair(i, int64_t{met - 1 - decltype(i)::value}); }); });
    });
    for (int64_t j = QUERIES - 1; j < count; ++j) {
      column([&](auto&& pair)
                 NATRPB_LAMBDA { unroll<QUERIES>([&](auto i) NATRPB_LAMBDA { pair(i, j - decltype(i)::value); }); });
    }
    unroll<QUERIES - 1>([&](auto j) NATRPB_LAMBDA {
      constexpr int passed = decltype(j)::value + 1;
      column([&](auto&& pair) NATRPB_LAMBDA {
        unroll<QUERIES - passed>([&](auto n) NATRPB_LAMBDA {
          constexpr int i = passed + decltype(n)::value;
          pair(Const<i>{}, count + decltype(j)::value - i);
        });
      });
    });
  } else {
    static_assert(R == Reach::kSame || QUERIES == 1);
    for (int64_t t = 0; t < count; ++t) {
      column([&](auto&& pair) NATRPB_LAMBDA { unroll<QUERIES>([&](auto i) NATRPB_LAMBDA { pair(i, t); }); });
    }
  }
}

// Queries of a sum or scatter tile at most. NB: two vectors of channels each are in registers.
inline constexpr int kQueryTile = NATRPB_VECTOR_BYTES == 64 ? 8 : 4;

// Calls tile(Const<queries>, Const<reach>, lane) for groups of up to MOST neighboring lanes that for_columns can walk.
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

// Where a weighted sum goes: out[lane][channel], times a factor per lane.
template <class T>
struct SumTarget {
  T* data;
  Steps steps;
  Vec<T> factor;
};

// out[i][channel] = factor_i * sum_t p[t][lane + i] * x[first_i + t][channel] over all key rows; QUERIES x VECTORS accumulators.
template <class T, int QUERIES, int VECTORS, Reach R>
void sum_tile(const T* p, const Block<T>& block, const KeyRows& rows, const Kernel& kernel, const Rows<T>& x, int64_t lane,
              int64_t channel, const SumTarget<T>& out) {
  constexpr int L = kLanes<T>;
  const int64_t step = x.step[2], count = block.count[lane];
  Vec<T> acc[QUERIES][VECTORS] = {};
  for_rows(rows, kernel, [&](int64_t slot, int64_t k0, int64_t k1) NATRPB_LAMBDA {
    const T* weights = p + slot * L + lane;
    const T* source = x.at(k0, k1, block.first[lane]) + channel;
    for_columns<QUERIES, R>(count, [&](auto&& meets) NATRPB_LAMBDA {
      Vec<T> row[VECTORS];
      unroll<VECTORS>([&](auto v)
                          NATRPB_LAMBDA { row[decltype(v)::value] = in_register(load(source + decltype(v)::value * L)); });
      source += step;
      meets([&](auto i, int64_t t) NATRPB_LAMBDA {
        const Vec<T> w = splat(weights[t * L + decltype(i)::value]);
        unroll<VECTORS>([&](auto v)
                            NATRPB_LAMBDA { acc[decltype(i)::value][decltype(v)::value] += w * row[decltype(v)::value]; });
      });
    });
  });
  T* to = out.data + out.steps(lane) + channel;
  unroll<QUERIES>([&](auto i) NATRPB_LAMBDA {
    constexpr int n = decltype(i)::value;
    const Vec<T> factor = splat(T(out.factor[lane + n]));
    unroll<VECTORS>([&](auto v) NATRPB_LAMBDA {
      constexpr int m = decltype(v)::value;
      store(to + n * out.steps.step + m * L, acc[n][m] * factor);
    });
  });
}

// The rows that a scatter takes from a block's queries: factor * data[lane][channel].
template <class T>
struct ScatterSource {
  const T* data;
  Steps steps;
  T factor;
};

// Calls body(Const<begin>, Const<end>) for the range of query rows begin .. end - 1 of ROWS, begin < end.
template <int ROWS, class F>
NATRPB_INLINE void with_rows(int begin, int end, F&& body) {
  unroll<ROWS>([&](auto b) NATRPB_LAMBDA {
    unroll<ROWS - decltype(b)::value>([&](auto n) NATRPB_LAMBDA {
      constexpr int kBegin = decltype(b)::value, kEnd = kBegin + decltype(n)::value + 1;
      if (begin == kBegin && end == kEnd) body(Const<kBegin>{}, Const<kEnd>{});
    });
  });
}

// dx[first_i + t][channel] += p[r][t][lane + i] * x[r][i][channel] over all key rows and ROWS query rows; x stays in registers,
// and what several query rows add to a key meets there: multiply-adds wait for stores (docs/design/cpu.md).
template <class T, int ROWS, int QUERIES, int VECTORS, Reach R>
void scatter_tile(const T* p, int64_t p_step, const Block<T>& block, const KeyRows* rows, const Kernel& kernel,
                  const ScatterSource<T>* x, int64_t lane, int64_t channel, const Rows<T>& dx) {
  constexpr int L = kLanes<T>;
  Vec<T> query[ROWS][QUERIES][VECTORS];
  int64_t start[ROWS];  // of key row (0, 0)'s weights: the others follow linearly
  unroll<ROWS>([&](auto r) NATRPB_LAMBDA {
    constexpr int row = decltype(r)::value;
    start[row] = row * p_step + first_slot(rows[row], kernel, 0, 0) * L + lane;
    const T* from = x[row].data + x[row].steps(lane) + channel;
    unroll<QUERIES>([&](auto i) NATRPB_LAMBDA {
      unroll<VECTORS>([&](auto v) NATRPB_LAMBDA {
        constexpr int n = decltype(i)::value, m = decltype(v)::value;
        query[row][n][m] = load(from + n * x[row].steps.step + m * L) * x[row].factor;
      });
    });
  });
  const int64_t step = dx.step[2], count = block.count[lane];  // NB: GCC would load them again after every store
  for_shared_rows(rows, ROWS, [&](int64_t k0, int64_t k1, int begin, int end) NATRPB_LAMBDA {
    T* target = dx.at(k0, k1, block.first[lane]) + channel;
    const int64_t offset = slots_of(kernel, k0, k1) * L;
    with_rows<ROWS>(begin, end, [&](auto first, auto last) NATRPB_LAMBDA {
      constexpr int kFirst = decltype(first)::value, kCount = decltype(last)::value - kFirst;
      const T* weights[kCount];
      unroll<kCount>([&](auto n)
                         NATRPB_LAMBDA { weights[decltype(n)::value] = p + (start[kFirst + decltype(n)::value] + offset); });
      T* to = target;
      for_columns<QUERIES, R>(count, [&](auto&& meets) NATRPB_LAMBDA {
        Vec<T> acc[2][VECTORS] = {};  // two chains: half the latency
        unroll<VECTORS>([&](auto v) NATRPB_LAMBDA { acc[0][decltype(v)::value] = load(to + decltype(v)::value * L); });
        meets([&](auto i, int64_t t) NATRPB_LAMBDA {
          unroll<kCount>([&](auto n) NATRPB_LAMBDA {
            constexpr int r = decltype(n)::value, chain = (decltype(i)::value * kCount + r) % 2;
            const Vec<T> w = splat(weights[r][t * L + decltype(i)::value]);
            unroll<VECTORS>([&](auto v) NATRPB_LAMBDA {
              acc[chain][decltype(v)::value] += w * query[kFirst + r][decltype(i)::value][decltype(v)::value];
            });
          });
        });
        unroll<VECTORS>([&](auto v) NATRPB_LAMBDA {
          constexpr int m = decltype(v)::value;
          store(to + m * L, acc[0][m] + acc[1][m]);
        });
        to += step;
      });
    });
  });
}

// Calls chunk(Const<vectors>, channel) for all channels, two vectors at a time.
template <class T, class F>
NATRPB_INLINE void for_channels(int64_t channels, F&& chunk) {
  constexpr int L = kLanes<T>;
  int64_t channel = 0;
  for (; channel + 2 * L <= channels; channel += 2 * L) chunk(Const<2>{}, channel);
  if (channel < channels) chunk(Const<1>{}, channel);
}

// out[lane][channel] = factor_lane * sum_t p[t][lane] * x_j(lane,t)[channel], for all live lanes and all channels.
template <class T>
void weighted_sum(const T* p, const Block<T>& block, const KeyRows& rows, const Kernel& kernel, const Rows<T>& x,
                  const SumTarget<T>& out) {
  for_lane_groups<kQueryTile>(block, kernel.size2, [&](auto queries, auto reach, int64_t lane) NATRPB_LAMBDA {
    for_channels<T>(x.channels, [&](auto vectors, int64_t channel) NATRPB_LAMBDA {
      constexpr int Q = decltype(queries)::value, V = decltype(vectors)::value;
      sum_tile<T, Q, V, static_cast<Reach>(decltype(reach)::value)>(p, block, rows, kernel, x, lane, channel, out);
    });
  });
}

// The transpose, for `count` query rows: dx_j(lane,t)[channel] += p[r][t][lane] * x[r][lane][channel]; p of a row is p_step numbers.
template <class T>
void scatter(const T* p, int64_t p_step, const Block<T>& block, const KeyRows* rows, int count, const Kernel& kernel,
             const ScatterSource<T>* x, const Rows<T>& dx) {
  unroll<kRowTile>([&](auto n) NATRPB_LAMBDA {
    constexpr int kRows = decltype(n)::value + 1;
    if (count != kRows) return;
    for_lane_groups<kRows == 1 ? kQueryTile : kQueryTile / 2>(
        block, kernel.size2, [&](auto queries, auto reach, int64_t lane) NATRPB_LAMBDA {
          for_channels<T>(dx.channels, [&](auto vectors, int64_t channel) NATRPB_LAMBDA {
            constexpr int Q = decltype(queries)::value, V = decltype(vectors)::value;
            constexpr Reach R = static_cast<Reach>(decltype(reach)::value);
            scatter_tile<T, kRows, Q, V, R>(p, p_step, block, rows, kernel, x, lane, channel, dx);
          });
        });
  });
}
