// Register tiles of local attention. A block is kLanes queries of one row (consecutive on axis 2); its scores lie in memory as
// [slot][lane], slot = (t_0 * K_1 + t_1) * K_2 + t_2.
//
//   score_tile   lanes are queries, keys are read from transposed rows [channel][column]; R query rows share every key load
//   sum_tile     lanes are channels, out_i = sum_t p_it x_j(i,t); neighboring queries share the loads of x
//   scatter_tile the transpose, dx_j = sum_i p_it(i,j) x_i; neighboring queries of several rows share the loads and
//                stores of dx
//
// Each multiply-add of the op happens in one of the three, or in a dot (local_attention_dots.inl).

// Rows and slots of a score tile: rows * slots accumulators, one query and one key vector must fit the register file.
inline constexpr int kRowTile = NATRPB_VECTOR_BYTES == 64 ? 3 : 2;
inline constexpr int kSlotTile = NATRPB_VECTOR_BYTES == 64 ? 8 : 5;

template <class T>
struct ScoreArgs {
  const T* query;  // [rows][depth][kLanes]
  const T* key;    // key row at the block's base column and the tile's first slot, [depth][pitch]; kAcross: boundary before it
  int64_t past;    // kAcross: how far that column is behind the boundary
  int64_t depth;   // in factors: numbers, or pairs of them
  int64_t pitch;
  T scale;
  const LaneMap<T>* key_lanes;
  const LaneMap<T>* bias_lanes;
  // Query row r of the tile: its scores begin at score[score_at + score_start[r]], its table row, at the block's base column and
  // the tile's first slot, at bias[bias_at + bias_start[r]].
  T* score;
  const T* bias;
  int64_t score_at, bias_at;
  const int64_t *score_start, *bias_start;
};

// score[r][t] = bias[r][t] + scale * sum_c query[r][c] * key[c][t], summed in runs of channels: a single long chain of fp32
// additions, begun from a large bias at that, would err several times more.
template <class F, int ROWS, int SLOTS, Reach R>
void score_tile(const ScoreArgs<Compute<F>>& args) {
  using T = Compute<F>;
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
      NATRPB_UNROLL for (int i = 0; i < ROWS; ++i) q[i] = load(query + i * depth * L);
      [[maybe_unused]] Vec<T> low, high;
      if constexpr (R == Reach::kAligned || R == Reach::kAcross) {
        low = load(key);
        high = load(key + L);
      }
      if constexpr (R == Reach::kAcross)
        place = in_register(place);  // NB: else GCC keeps the places of all slots, and spills them
      const auto meet = [&](int j, Vec<T> k) NATRPB_LAMBDA {
        NATRPB_UNROLL for (int i = 0; i < ROWS; ++i) acc[i][j] = multiply_add<F>(acc[i][j], q[i], k);
      };
      if constexpr (R == Reach::kAligned) {
        unroll<SLOTS>([&](auto t)
                          NATRPB_LAMBDA { meet(decltype(t)::value, in_register(shift_in<decltype(t)::value, T>(low, high))); });
      } else {
        NATRPB_UNROLL for (int j = 0; j < SLOTS; ++j) {
          if constexpr (R == Reach::kAcross) {
            meet(j, in_register(pick<T>(low, place + j, high)));
          } else {
            meet(j, in_register(load_lanes<T, R>(key + j, lanes)));
          }
        }
      }
    }
    const Vec<T> scale = splat(args.scale);
    const auto add_to = [&](auto first) NATRPB_LAMBDA {
      NATRPB_UNROLL for (int i = 0; i < ROWS; ++i) {
        T* score = args.score + (args.score_at + args.score_start[i]);
        const T* bias = args.bias + (args.bias_at + args.bias_start[i]);
        NATRPB_UNROLL for (int j = 0; j < SLOTS; ++j) {
          const Vec<T> before =
              decltype(first)::value ? load_lanes<T, Reach::kWithin>(bias + j, bias_lanes) : load(score + j * L);
          store(score + j * L, before + scale * acc[i][j]);
        }
      }
    };
    begin == 0 ? add_to(Const<true>{}) : add_to(Const<false>{});
  }
}

template <class T>
using ScoreTile = void (*)(const ScoreArgs<T>&);

template <class F, Reach R, int... I>
NATRPB_INLINE ScoreTile<Compute<F>> pick_score_tile(int index, std::integer_sequence<int, I...>) {
  static constexpr ScoreTile<Compute<F>> tiles[] = {&score_tile<F, I / kSlotTile + 1, I % kSlotTile + 1, R>...};
  return tiles[index];
}
template <class F>
ScoreTile<Compute<F>> pick_score_tile(int rows, int slots, Reach reach) {
  const int index = (rows - 1) * kSlotTile + slots - 1;
  const auto all = std::make_integer_sequence<int, kRowTile * kSlotTile>{};
  if (reach == Reach::kConsecutive) return pick_score_tile<F, Reach::kConsecutive>(index, all);
  if (reach == Reach::kSame) return pick_score_tile<F, Reach::kSame>(index, all);
  if constexpr (kTakesFromTwo) {
    if (reach == Reach::kAligned) return pick_score_tile<F, Reach::kAligned>(index, all);
    if (reach == Reach::kAcross) return pick_score_tile<F, Reach::kAcross>(index, all);
  }
  return pick_score_tile<F, Reach::kWithin>(index, all);
}

// Queries of a sum or scatter tile at most. NB: two vectors of channels each are in registers.
inline constexpr int kQueryTile = NATRPB_VECTOR_BYTES == 64 ? 8 : 4;

// A kernel whose slots are words. NB: K columns that begin in the middle of a word reach into K / 2 + 1 of them.
template <class F>
NATRPB_INLINE Kernel word_kernel(const Kernel& kernel) {
  return {kernel.size0, kernel.size1, kNumbers<F> == 1 ? kernel.size2 : kernel.size2 / 2 + 1};
}

// Where a weighted sum goes: out[lane][channel], times a factor per lane.
template <class T, class S>
struct SumTarget {
  S* data;
  Steps steps;
  int64_t channels;
  Vec<T> factor;
};

// out[i][channel] = factor_i * sum_t p[t][lane + i] * x[first_i + t][channel] over all key rows; QUERIES x VECTORS accumulators.
// Slots t and columns are words; ODD, where it matters (kConsecutive): the first query's place in its first word.
template <class F, int QUERIES, int VECTORS, Reach R, int ODD, class S>
void sum_tile(const Compute<F>* p, const Block<Compute<F>>& block, const KeyRows& rows, const Kernel& kernel,
              const Rows<Compute<F>>& x, int64_t lane, int64_t channel, const SumTarget<Compute<F>, S>& out) {
  using T = Compute<F>;
  constexpr int L = kLanes<T>, kWidth = kNumbers<F>;
  const Kernel words = word_kernel<F>(kernel);
  const int64_t step = x.step[2], first = block.first[lane] / kWidth;
  const int64_t count =
      R == Reach::kConsecutive ? words.size2 : ceil_div(block.first[lane] % kWidth + block.count[lane], kWidth);
  Vec<T> acc[QUERIES][VECTORS] = {};
  for_rows(rows, words, [&](int64_t slot, int64_t k0, int64_t k1) NATRPB_LAMBDA {
    const T* weights = p + slot * L + lane;
    const T* source = x.at(k0, k1, first) + channel;
    for_words<QUERIES, R, kWidth, ODD>(count, [&](auto&& meets) NATRPB_LAMBDA {
      Vec<T> row[VECTORS];
      NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) row[v] = in_register(load(source + v * L));
      source += step;
      meets([&](auto i, int64_t t) NATRPB_LAMBDA {
        constexpr int n = decltype(i)::value;
        const Vec<T> w = splat(weights[t * L + n]);
        NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) acc[n][v] = multiply_add<F>(acc[n][v], w, row[v]);
      });
    });
  });
  S* to = out.data + out.steps(lane) + channel;
  const int64_t to_step = out.steps.step, left = out.channels - channel;
  const auto write = [&](auto whole) NATRPB_LAMBDA {
    NATRPB_UNROLL for (int i = 0; i < QUERIES; ++i) {
      const Vec<T> factor = splat(T(out.factor[lane + i]));
      NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) {
        const Vec<T> sum = acc[i][v] * factor;
        decltype(whole)::value ? store_as(to + i * to_step + v * L, sum)
                               : store_channels<T>(to + i * to_step + v * L, sum, left - v * L);
      }
    }
  };
  left >= VECTORS* L ? write(Const<true>{}) : write(Const<false>{});
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
  NATRPB_UNROLL for (int r = 0; r < ROWS; ++r) {
    start[r] = r * p_step + first_slot(rows[r], kernel, 0, 0) * L + lane;
    const T* from = x[r].data + x[r].steps(lane) + channel;
    NATRPB_UNROLL for (int i = 0; i < QUERIES; ++i) {
      NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) query[r][i][v] = load(from + i * x[r].steps.step + v * L) * x[r].factor;
    }
  }
  const int64_t step = dx.step[2], count = block.count[lane];  // NB: GCC would load them again after every store
  for_shared_rows(rows, ROWS, [&](int64_t k0, int64_t k1, int begin, int end) NATRPB_LAMBDA {
    T* target = dx.at(k0, k1, block.first[lane]) + channel;
    const int64_t offset = slots_of(kernel, k0, k1) * L;
    with_rows<ROWS>(begin, end, [&](auto first, auto last) NATRPB_LAMBDA {
      constexpr int kFirst = decltype(first)::value, kCount = decltype(last)::value - kFirst;
      const T* weights[kCount];
      NATRPB_UNROLL for (int r = 0; r < kCount; ++r) weights[r] = p + (start[kFirst + r] + offset);
      T* to = target;
      for_words<QUERIES, R>(count, [&](auto&& meets) NATRPB_LAMBDA {
        Vec<T> acc[2][VECTORS] = {};  // two chains: half the latency
        NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) acc[0][v] = load(to + v * L);
        meets([&](auto i, int64_t t) NATRPB_LAMBDA {
          constexpr int n = decltype(i)::value;
          NATRPB_UNROLL for (int r = 0; r < kCount; ++r) {
            const Vec<T> w = splat(weights[r][t * L + n]);
            NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) acc[(n * kCount + r) % 2][v] += w * query[kFirst + r][n][v];
          }
        });
        NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) store(to + v * L, acc[0][v] + acc[1][v]);
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
template <class F, class S>
void weighted_sum(const Compute<F>* p, const Block<Compute<F>>& block, const KeyRows& rows, const Kernel& kernel,
                  const Rows<Compute<F>>& x, const SumTarget<Compute<F>, S>& out) {
  for_lane_groups<kQueryTile>(block, kernel.size2, [&](auto queries, auto reach, int64_t lane) NATRPB_LAMBDA {
    for_channels<Compute<F>>(x.channels, [&](auto vectors, int64_t channel) NATRPB_LAMBDA {
      constexpr int Q = decltype(queries)::value, V = decltype(vectors)::value;
      constexpr Reach R = static_cast<Reach>(decltype(reach)::value);
      if (kNumbers<F> == 1 || R == Reach::kSame || block.first[lane] % 2 == 0) {
        sum_tile<F, Q, V, R, 0>(p, block, rows, kernel, x, lane, channel, out);
      } else if constexpr (kNumbers<F> == 2 && R == Reach::kConsecutive) {
        sum_tile<F, Q, V, R, 1>(p, block, rows, kernel, x, lane, channel, out);
      }
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
