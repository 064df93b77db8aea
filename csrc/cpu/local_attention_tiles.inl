// Register tiles of local attention. A block is kLanes queries of one row (consecutive on axis 2); its scores lie in memory as
// [slot][lane], slot = (t_0 * K_1 + t_1) * K_2 + t_2.
//
//   score_tile   lanes are queries, keys are read from transposed rows [channel][column]; R query rows share every key load
//   sum_tile     lanes are channels, out_i = sum_t p_it x_j(i,t); neighboring queries share the loads of x where they can
//   scatter_key  the transpose: dx_j = sum_i p_it(i,j) x_i, all contributions of a block to one key at once
//
// Each multiply-add of the op happens in one of the three.

// How the lanes of a block reach into a row of memory: lane l reads p[base + offset[l]].
enum class Reach { kConsecutive, kSame, kWithin, kAnywhere };  // offset[l] = l; = 0; < kLanes; anything

template <class T>
struct LaneMap {
  Reach reach;
  Index<T> index;            // offsets, for kWithin
  int64_t offset[kLanes<T>];
};

template <class T>
NATRPB_INLINE LaneMap<T> map_lanes(const int64_t* position, int64_t base, int64_t live) {
  LaneMap<T> map;
  bool consecutive = true, same = true, within = true;
  for (int l = 0; l < kLanes<T>; ++l) {
    const int64_t offset = position[l < live ? l : live - 1] - base;
    map.offset[l] = offset;
    map.index[l] = offset < kLanes<T> ? offset : 0;
    consecutive &= l >= live || offset == l;
    same &= offset == 0;
    within &= offset < kLanes<T>;
  }
  map.reach = same ? Reach::kSame : consecutive ? Reach::kConsecutive : within ? Reach::kWithin : Reach::kAnywhere;
  return map;
}

template <class T, Reach R>
NATRPB_INLINE Vec<T> load_lanes(const T* p, const LaneMap<T>& map) {
  if constexpr (R == Reach::kConsecutive) return load(p);
  if constexpr (R == Reach::kSame) return splat(*p);
  if constexpr (R == Reach::kWithin) return permute<T>(load(p), map.index);
  Vec<T> v{};
  for (int l = 0; l < kLanes<T>; ++l) v[l] = p[map.offset[l]];
  return v;
}
template <class T>
NATRPB_INLINE Vec<T> load_lanes(const T* p, const LaneMap<T>& map) {
  switch (map.reach) {
    case Reach::kConsecutive:
      return load_lanes<T, Reach::kConsecutive>(p, map);
    case Reach::kSame:
      return load_lanes<T, Reach::kSame>(p, map);
    case Reach::kWithin:
      return load_lanes<T, Reach::kWithin>(p, map);
    default:
      return load_lanes<T, Reach::kAnywhere>(p, map);
  }
}

// Rows and slots of a score tile: rows * slots accumulators, one query and one key vector must fit the register file.
inline constexpr int kRowTile = NATRPB_VECTOR_BYTES == 64 ? 3 : 2;
inline constexpr int kSlotTile = NATRPB_VECTOR_BYTES == 64 ? 8 : 5;

template <class T>
struct ScoreArgs {
  const T* query;                // [rows][depth][kLanes]
  const T* key;                  // key row at the block's base column and the tile's first slot, [depth][pitch]
  int64_t depth;
  int64_t pitch;
  const LaneMap<T>* key_lanes;
  T* score[kRowTile];            // [slots][kLanes], of every query row
};

// score[r][t] += sum_c query[r][c] * key[c][t]
template <class T, int ROWS, int SLOTS, Reach R>
void score_tile(const ScoreArgs<T>& args) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[ROWS][SLOTS];
  unroll<ROWS>([&](auto r) NATRPB_LAMBDA {
    unroll<SLOTS>([&](auto t) NATRPB_LAMBDA {
      constexpr int i = decltype(r)::value, j = decltype(t)::value;
      acc[i][j] = load(args.score[i] + j * L);
    });
  });
  const LaneMap<T> lanes = *args.key_lanes;
  const int64_t depth = args.depth;
  const T* key = args.key;
  const T* query = args.query;
  for (int64_t c = 0; c < depth; ++c, key += args.pitch, query += L) {
    Vec<T> q[ROWS];
    unroll<ROWS>([&](auto r) NATRPB_LAMBDA { q[decltype(r)::value] = load(query + decltype(r)::value * depth * L); });
    unroll<SLOTS>([&](auto t) NATRPB_LAMBDA {
      constexpr int j = decltype(t)::value;
      const Vec<T> k = load_lanes<T, R>(key + j, lanes);
      unroll<ROWS>([&](auto r) NATRPB_LAMBDA { acc[decltype(r)::value][j] += q[decltype(r)::value] * k; });
    });
  }
  unroll<ROWS>([&](auto r) NATRPB_LAMBDA {
    unroll<SLOTS>([&](auto t) NATRPB_LAMBDA {
      constexpr int i = decltype(r)::value, j = decltype(t)::value;
      store(args.score[i] + j * L, acc[i][j]);
    });
  });
}

template <class T>
using ScoreTile = void (*)(const ScoreArgs<T>&);

template <class T, Reach R, int... I>
constexpr ScoreTile<T> pick_score_tile(int index, std::integer_sequence<int, I...>) {
  ScoreTile<T> tiles[] = {&score_tile<T, I / kSlotTile + 1, I % kSlotTile + 1, R>...};
  return tiles[index];
}
template <class T>
ScoreTile<T> pick_score_tile(int rows, int slots, Reach reach) {
  const int index = (rows - 1) * kSlotTile + slots - 1;
  const auto all = std::make_integer_sequence<int, kRowTile * kSlotTile>{};
  switch (reach) {
    case Reach::kConsecutive:
      return pick_score_tile<T, Reach::kConsecutive>(index, all);
    case Reach::kSame:
      return pick_score_tile<T, Reach::kSame>(index, all);
    case Reach::kWithin:
      return pick_score_tile<T, Reach::kWithin>(index, all);
    default:
      return pick_score_tile<T, Reach::kAnywhere>(index, all);
  }
}

// The axis-2 side of a block: live lanes and, per lane, the interval of key columns relative to the box's first key.
template <class T>
struct Block {
  int64_t column;             // first query, in-group
  int live;
  int64_t first[kLanes<T>];   // NB: lanes beyond live repeat the last live one
  int64_t count[kLanes<T>];
  bool full;                  // every live lane sees K_2 columns
  LaneMap<T> key_lanes;       // from first[0]
  LaneMap<T> bias_lanes;      // from bias_base
  int64_t bias_base;
  int64_t bias_first[kLanes<T>];  // table column of every lane's slot 0
};

// The rows (axes 0 and 1) of keys that a query row sees, relative to the box's first key.
struct KeyRows {
  Interval axis0;
  Interval axis1;
};

// One row of staged tensors: keys [key_n0][key_n1][key_n2][pitch].
template <class T>
struct Staged {
  T* data;
  int64_t rows1;    // key_n1
  int64_t columns;  // key_n2
  int64_t pitch;    // channels, padded to whole vectors

  NATRPB_INLINE T* at(int64_t k0, int64_t k1, int64_t column) const {
    return data + ((k0 * rows1 + k1) * columns + column) * pitch;
  }
};

// out[i][channel] = sum over t of p[t][lane + i] * x[first[lane + i] + t][channel], QUERIES queries and VECTORS vectors.
// R: kConsecutive or kSame intervals share the loads of x; kAnywhere does not.
template <class T, int QUERIES, int VECTORS, Reach R>
void sum_tile(const T* p, const Block<T>& block, const KeyRows& rows, int64_t k1, int64_t k2, const Staged<T>& x,
              int64_t lane, int64_t channel, T* out) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[QUERIES][VECTORS] = {};
  const auto add = [&](auto i, const T* weight, const Vec<T>* row) NATRPB_LAMBDA {
    const Vec<T> w = splat(*weight);
    unroll<VECTORS>([&](auto v) NATRPB_LAMBDA { acc[decltype(i)::value][decltype(v)::value] += w * row[decltype(v)::value]; });
  };
  const auto read = [&](const T* source, Vec<T>* row) NATRPB_LAMBDA {
    unroll<VECTORS>([&](auto v) NATRPB_LAMBDA { row[decltype(v)::value] = load(source + decltype(v)::value * L); });
  };
  for (int64_t r0 = rows.axis0.first; r0 <= rows.axis0.last; ++r0) {
    for (int64_t r1 = rows.axis1.first; r1 <= rows.axis1.last; ++r1) {
      const T* weights = p + ((r0 - rows.axis0.first) * k1 + r1 - rows.axis1.first) * k2 * L + lane;
      const T* source = x.at(r0, r1, block.first[lane]) + channel;
      Vec<T> row[VECTORS];
      if constexpr (R == Reach::kConsecutive) {
        // Column j meets slot j - i of query i: fewer queries at both ends, all of them between (k2 >= QUERIES).
        unroll<QUERIES - 1>([&](auto j) NATRPB_LAMBDA {
          read(source + decltype(j)::value * x.pitch, row);
          unroll<decltype(j)::value + 1>([&](auto i) NATRPB_LAMBDA {
            add(i, weights + (decltype(j)::value - decltype(i)::value) * L + decltype(i)::value, row);
          });
        });
        for (int64_t j = QUERIES - 1; j < k2; ++j) {
          read(source + j * x.pitch, row);
          unroll<QUERIES>([&](auto i) NATRPB_LAMBDA {
            add(i, weights + (j - decltype(i)::value) * L + decltype(i)::value, row);
          });
        }
        unroll<QUERIES - 1>([&](auto j) NATRPB_LAMBDA {
          read(source + (k2 + decltype(j)::value) * x.pitch, row);
          unroll<QUERIES - 1 - decltype(j)::value>([&](auto n) NATRPB_LAMBDA {
            constexpr int i = decltype(j)::value + 1 + decltype(n)::value;
            add(Const<i>{}, weights + (k2 + decltype(j)::value - i) * L + i, row);
          });
        });
      } else if constexpr (R == Reach::kSame) {
        for (int64_t t = 0; t < block.count[lane]; ++t) {
          read(source + t * x.pitch, row);
          unroll<QUERIES>([&](auto i) NATRPB_LAMBDA { add(i, weights + t * L + decltype(i)::value, row); });
        }
      } else {
        static_assert(QUERIES == 1 || R == Reach::kAnywhere);
        int64_t step[QUERIES];
        unroll<QUERIES>([&](auto i) NATRPB_LAMBDA {
          step[decltype(i)::value] = (block.first[lane + decltype(i)::value] - block.first[lane]) * x.pitch;
        });
        for (int64_t t = 0; t < block.count[lane]; ++t) {
          unroll<QUERIES>([&](auto i) NATRPB_LAMBDA {
            read(source + t * x.pitch + step[decltype(i)::value], row);
            add(i, weights + t * L + decltype(i)::value, row);
          });
        }
      }
    }
  }
  unroll<QUERIES>([&](auto i) NATRPB_LAMBDA {
    unroll<VECTORS>([&](auto v) NATRPB_LAMBDA {
      constexpr int n = decltype(i)::value, m = decltype(v)::value;
      store(out + (lane + n) * x.pitch + channel + m * L, acc[n][m]);
    });
  });
}

// out[lane][channel] for all live lanes and all channels of x.
template <class T>
void weighted_sum(const T* p, const Block<T>& block, const KeyRows& rows, int64_t k1, int64_t k2, const Staged<T>& x, T* out) {
  constexpr int L = kLanes<T>;
  constexpr int kQueries = L < 4 ? L : 4;
  const auto columns = [&](auto queries, auto reach, int64_t lane) NATRPB_LAMBDA {
    constexpr int Q = decltype(queries)::value;
    constexpr Reach R = static_cast<Reach>(decltype(reach)::value);
    int64_t channel = 0;
    for (; channel + 2 * L <= x.pitch; channel += 2 * L) {
      sum_tile<T, Q, 2, R>(p, block, rows, k1, k2, x, lane, channel, out);
    }
    if (channel < x.pitch) sum_tile<T, Q, 1, R>(p, block, rows, k1, k2, x, lane, channel, out);
  };
  constexpr Const<static_cast<int>(Reach::kConsecutive)> consecutive;
  constexpr Const<static_cast<int>(Reach::kSame)> same;
  constexpr Const<static_cast<int>(Reach::kAnywhere)> anywhere;
  int64_t lane = 0;
  for (; lane + kQueries <= block.live; lane += kQueries) {
    bool is_consecutive = k2 >= kQueries, is_same = true, equal_count = true;
    for (int i = 1; i < kQueries; ++i) {
      is_consecutive &= block.first[lane + i] == block.first[lane] + i;
      is_same &= block.first[lane + i] == block.first[lane];
      equal_count &= block.count[lane + i] == block.count[lane];
    }
    if (!equal_count) {
      for (int i = 0; i < kQueries; ++i) columns(Const<1>{}, anywhere, lane + i);
    } else if (is_same) {
      columns(Const<kQueries>{}, same, lane);
    } else if (is_consecutive && block.count[lane] == k2) {
      columns(Const<kQueries>{}, consecutive, lane);
    } else {
      columns(Const<kQueries>{}, anywhere, lane);
    }
  }
  for (; lane < block.live; ++lane) columns(Const<1>{}, anywhere, lane);
}

// dx[key][:] += sum over the lanes that see the key of p[slot(lane, key)][lane] * x[lane][:].
template <class T, int VECTORS>
NATRPB_INLINE void scatter_key(const T* p, const Block<T>& block, int lane_begin, int lane_end, int64_t column, const T* x,
                               int64_t pitch, int64_t channel, T* dx) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[VECTORS];
  unroll<VECTORS>([&](auto v) NATRPB_LAMBDA { acc[decltype(v)::value] = load(dx + channel + decltype(v)::value * L); });
  for (int lane = lane_begin; lane < lane_end; ++lane) {
    const Vec<T> w = splat(p[(column - block.first[lane]) * L + lane]);
    unroll<VECTORS>([&](auto v) NATRPB_LAMBDA {
      acc[decltype(v)::value] += w * load(x + lane * pitch + channel + decltype(v)::value * L);
    });
  }
  unroll<VECTORS>([&](auto v) NATRPB_LAMBDA { store(dx + channel + decltype(v)::value * L, acc[decltype(v)::value]); });
}

// Adds a block's contributions to all the keys it sees: dx[j(i,t)] += p[t][i] * x[i], x [kLanes][pitch].
template <class T>
void scatter(const T* p, const Block<T>& block, const KeyRows& rows, int64_t k1, int64_t k2, const T* x, const Staged<T>& dx) {
  constexpr int L = kLanes<T>;
  const int64_t end = block.first[block.live - 1] + block.count[block.live - 1];
  for (int64_t r0 = rows.axis0.first; r0 <= rows.axis0.last; ++r0) {
    for (int64_t r1 = rows.axis1.first; r1 <= rows.axis1.last; ++r1) {
      const T* weights = p + ((r0 - rows.axis0.first) * k1 + r1 - rows.axis1.first) * k2 * L;
      int lane_begin = 0, lane_end = 0;  // the lanes that see the column; both only grow
      for (int64_t column = block.first[0]; column < end; ++column) {
        while (lane_end < block.live && block.first[lane_end] <= column) ++lane_end;
        while (lane_begin < lane_end && block.first[lane_begin] + block.count[lane_begin] <= column) ++lane_begin;
        T* target = dx.at(r0, r1, column);
        int64_t channel = 0;
        for (; channel + 2 * L <= dx.pitch; channel += 2 * L) {
          scatter_key<T, 2>(weights, block, lane_begin, lane_end, column, x, dx.pitch, channel, target);
        }
        if (channel < dx.pitch) {
          scatter_key<T, 1>(weights, block, lane_begin, lane_end, column, x, dx.pitch, channel, target);
        }
      }
    }
  }
}
