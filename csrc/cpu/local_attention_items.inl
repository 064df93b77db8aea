// One work item of every op: stage the item's keys, then for each block of queries compute scores, weights, sums, gradients.
//
// Staged keys are in the compute type, padded to whole vectors and zero behind the end, so that no tile knows strides, storage
// types or remainders. The block loop runs columns outside and rows inside: lane maps and bias columns belong to a column.
//
// Bytes: forward reads query once, key and value once per box that needs them, writes out and lse; backward reads query, key,
// value, dout, lse and writes dquery, dkey, dvalue. Scores live in scratch memory, kRowTile rows of one block at a time.

// F is what products are made of: numbers of the compute type or, where S is bf16, pairs of S as they are.
template <class S, class F = Compute<S>>
struct Worker {
  using T = Compute<S>;
  using Storage = S;
  using Word = std::conditional_t<std::is_same_v<F, T>, S, F>;  // F in storage
  static constexpr int L = kLanes<T>;
  static constexpr bool kPaired = kNumbers<F> == 2;
  static constexpr bool kDots = kVectorBytes == 64 && std::is_same_v<S, T>;  // where few slots are faster so

  const LocalAttentionParams& params;
  const Plan& plan;
  const Needs needs;
  Item item;
  const int64_t depth, value_depth;      // D, Dv
  const int64_t key_pitch, value_pitch;  // padded to whole vectors
  const Kernel kernel;
  const int64_t k2, slots;
  const int64_t table1, table2, bias_pitch;  // 2 K_1 - 1, 2 K_2 - 1, padded
  Rows<T> key_rows, value_rows, dkey_rows, dvalue_rows;
  T *dkey_sums, *dvalue_sums;      // dense rows, where the tensors cannot take the sums
  T *key_columns, *value_columns;  // transposed rows, [key row][factor][column_pitch]
  int64_t column_pitch;
  int64_t column_lead;              // the first key's column there: puts the keys of most blocks on a vector's boundary
  T *query_columns, *dout_columns;  // [kRowTile][factor][L]
  T *query_tile, *dout_tile;        // [kRowTile][L][pitch], copies of natural rows where the tensor will not do
  T* result_tile;                   // [L][pitch]
  T* weight_pairs;                  // [key rows][K_2 / 2 + 1][L]
  T *score, *dscore;                // [kRowTile][slots][L]
  T *bias, *dbias;                  // [table rows][bias_pitch]; [table rows][K_2][L]
  T* no_bias;                       // zeros, a score tile's
  Stream<S> stream;
  size_t bytes;

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }
  static int64_t factors(int64_t channels) { return channels / kNumbers<F>; }

  Worker(const LocalAttentionParams& p, const Plan& pl, Op op, void* scratch)
      : params(p),
        plan(pl),
        needs(needs_of(op, p, kDots && in_place(p.head_dim) && in_place(p.value_dim))),
        depth(p.head_dim),
        value_depth(p.value_dim),
        key_pitch(padded(depth)),
        value_pitch(padded(value_depth)),
        kernel{p.axis[0].kernel_size, p.axis[1].kernel_size, p.axis[2].kernel_size},
        k2(kernel.size2),
        slots(pl.slots),
        table1(2 * kernel.size1 - 1),
        table2(2 * k2 - 1),
        bias_pitch(padded(table2) + L),
        column_pitch(padded(pl.key_size[2] + most_lead() + (is_neighborhood() ? L : k2 + L))),
        stream(p, pl, needs.dkey) {
    const int64_t keys = plan.keys_max, rows = plan.key_size[0] * plan.key_size[1], table_rows = plan.table / table2;
    const int64_t words = kPaired ? rows * ceil_div(plan.key_size[2], 2) + 1 : keys;
    Arena arena(scratch);
    const auto take = [&](bool wanted, int64_t count) { return wanted ? arena.take<T>(count) : nullptr; };
    key_columns = take(needs.scores, rows * factors(depth) * column_pitch);
    value_columns = take(needs.dscores, rows * factors(value_depth) * column_pitch);
    key_rows.data = take(needs.key_rows, words * key_pitch);
    value_rows.data = take(needs.value_rows, words * value_pitch);
    dkey_sums = take(needs.dkey && !sums_in_place(params.dkey, depth), keys * key_pitch);
    dvalue_sums = take(needs.dvalue && !sums_in_place(params.dvalue, value_depth), keys * value_pitch);
    query_columns = take(needs.scores, kRowTile * factors(depth) * L);
    dout_columns = take(needs.dscores, kRowTile * factors(value_depth) * L);
    query_tile = take(needs.query_tile, kRowTile * L * key_pitch);
    dout_tile = take(needs.dout_tile, kRowTile * L * value_pitch);
    result_tile = take(true, L * (key_pitch > value_pitch ? key_pitch : value_pitch));
    weight_pairs = take(kPaired, slots_of(word_kernel<F>(kernel), kernel.size0, 0) * L);
    score = take(true, kRowTile * slots * L);
    dscore = take(needs.dkey && needs.dvalue, kRowTile * slots * L);
    bias = take(needs.bias, table_rows * bias_pitch);
    dbias = take(needs.dbias, table_rows * k2 * L);
    no_bias = take(needs.scores, kSlotTile + L);
    bytes = arena.used();
  }

  // ---- staging ----

  bool is_neighborhood() const { return params.axis[2].kind == AxisKind::kNeighborhood; }
  // Keys of a block of a neighborhood begin K / 2 before its first query, which is at a multiple of L.
  int64_t most_lead() const { return is_neighborhood() ? k2 / 2 % L : 0; }

  // Address of a row's first element in storage; the row's next columns lie column_step apart.
  S* row_start(const View& view, int64_t p0, int64_t p1, int64_t p2) const {
    return row_address<S>(params, item, view, p0, p1, p2);
  }
  int64_t column_step(const View& view) const { return step_of(params, view, 2); }

  // From lane to lane of a block.
  Steps lane_steps(const View& view, const Block<T>& block) const {
    const int64_t step = column_step(view);
    return {step, block.width, step_of(params, view, 1) - block.width * step};
  }

  // Whether a tensor can be read in place: no conversion, no padding.
  static bool in_place(int64_t channels) { return std::is_same_v<S, T> && channels % L == 0; }
  // Whether a box of keys finds room in the caches as it lies. Columns that a multiple of eight rows separates, those of other
  // heads, share an eighth of the first-level cache's sets or less; then a copy is faster, and beyond 2 KB no slower.
  bool is_near(const View& view, int64_t channels) const {
    const int64_t step = column_step(view), most = 2048 / static_cast<int64_t>(sizeof(T));
    return step == 0 || (step <= most && step % (8 * channels) != 0);
  }

  template <class Body>
  void for_key_rows(Body&& body) const {
    for (int64_t r0 = 0; r0 < item.key_n[0]; ++r0) {
      for (int64_t r1 = 0; r1 < item.key_n[1]; ++r1) body(r0, r1);
    }
  }
  void stage_columns(const View& view, int64_t channels, T* to) const {
    const int64_t columns = item.key_n[2];
    for_key_rows([&](int64_t r0, int64_t r1) {
      if (r1 + 1 < item.key_n[1]) {
        const S* next = row_start(view, item.key_lo[0] + r0, item.key_lo[1] + r1 + 1, item.key_lo[2]);
        prefetch_columns(next, column_step(view), columns, channels);
      }
      T* row = to + (r0 * item.key_n[1] + r1) * factors(channels) * column_pitch;
      const int64_t written = padded(column_lead + columns);
      for (int64_t c = 0; c < factors(channels); ++c) {
        for (int64_t i = written; i < column_pitch; i += L) store(row + c * column_pitch + i, Vec<T>{});
      }
      copy_columns<Word>(row_start(view, item.key_lo[0] + r0, item.key_lo[1] + r1, item.key_lo[2]), column_step(view), columns,
                         factors(channels), column_pitch, row, column_lead);
    });
  }
  // Points `rows` at the item's keys in `view`, or fills it with a copy, of columns two by two where factors are pairs. Whether sums
  // can be made of it: a pair's weight of zero does not hide a number that is not finite. NB: queries of an even kernel end a word
  // behind their last column, with weights of zero: behind the last row as well.
  bool stage_rows(const View& view, int64_t channels, Rows<T>& rows) const {
    if (!kPaired && in_place(channels) && is_near(view, channels)) {
      place_rows(view, channels, rows);
      return true;
    }
    layout_rows(channels, ceil_div(item.key_n[2], kNumbers<F>), rows);
    bool finite = true;
    for_key_rows([&](int64_t r0, int64_t r1) {
      const S* from = row_start(view, item.key_lo[0] + r0, item.key_lo[1] + r1, item.key_lo[2]);
      if constexpr (kPaired) {
        finite &= copy_row_pairs(from, column_step(view), item.key_n[2], channels, rows.at(r0, r1, 0));
      } else {
        copy_rows(from, column_step(view), item.key_n[2], channels, rows.at(r0, r1, 0));
      }
    });
    if (kPaired) clear(rows.at(item.key_n[0], 0, 0), rows.channels);
    return finite;
  }
  // The item's keys in a tensor of the compute type.
  void place_rows(const View& view, int64_t channels, Rows<T>& rows) const {
    rows.data = row_address<T>(params, item, view, item.key_lo[0], item.key_lo[1], item.key_lo[2]);
    for (int a = 0; a < kAxes; ++a) rows.step[a] = step_of(params, view, a);
    rows.channels = channels;
  }
  // Dense rows of padded channels, in the order of the box with that many columns.
  void layout_rows(int64_t channels, int64_t columns, Rows<T>& rows) const {
    rows.channels = rows.step[2] = padded(channels);
    rows.step[1] = rows.step[2] * columns;
    rows.step[0] = rows.step[1] * item.key_n[1];
  }
  // The block's natural rows of `view` for a scatter: in place, or copied to `tile`.
  ScatterSource<T> block_rows(const View& view, int64_t p0, int64_t p1, const Block<T>& block, int64_t channels, T factor,
                              T* tile) const {
    const S* start = row_start(view, p0, p1, block.column);
    if (in_place(channels)) return {reinterpret_cast<const T*>(start), lane_steps(view, block), factor};
    copy_rows(start, lane_steps(view, block), block.live, channels, tile);
    return {tile, padded(channels), factor};
  }
  void stage_bias() {
    const T* table = static_cast<const T*>(params.rpb) + item.head * plan.table;
    for (int64_t row = 0; row < plan.table / table2; ++row) {
      T* to = bias + row * bias_pitch;
      for (int64_t i = 0; i < bias_pitch; i += L) store(to + i, Vec<T>{});
      __builtin_memcpy(to, table + row * table2, static_cast<size_t>(table2) * sizeof(T));
    }
  }

  // Whether there is an item to work on that these factors can do.
  bool begin(int64_t index) {
    item = locate(params, plan, index);
    if (item.empty) return false;
    const bool edges_only = item.hi[2] - item.lo[2] <= L;  // one block: its keys stop at both borders
    column_lead = edges_only ? 0 : max_of(most_lead() - (item.lo[2] - item.key_lo[2]), 0);
    if (needs.scores) stage_columns(params.key, depth, key_columns);
    if (needs.dscores) stage_columns(params.value, value_depth, value_columns);
    if (needs.key_rows && !stage_rows(params.key, depth, key_rows)) return false;
    if (needs.value_rows && !stage_rows(params.value, value_depth, value_rows)) return false;
    if (needs.dkey) start_sums(params.dkey, depth, dkey_sums, dkey_rows);
    if (needs.dvalue) start_sums(params.dvalue, value_depth, dvalue_sums, dvalue_rows);
    if (needs.bias) stage_bias();
    if (needs.scores) clear(no_bias, kSlotTile + L);
    return true;
  }

  // ---- blocks ----
  KeyRows key_rows_of(int64_t p0, int64_t p1) const {
    const auto relative = [&](int axis, int64_t p) {
      const Interval keys = params.axis[axis].keys(p, item.size[axis]);
      return Interval{keys.first - item.key_lo[axis], keys.last - item.key_lo[axis]};
    };
    return {relative(0, p0), relative(1, p1)};
  }
  // Row of a bias table for query row (p0, p1) and key row (r0, r1), r relative to the box.
  int64_t bias_row(int64_t p0, int64_t p1, int64_t r0, int64_t r1) const {
    return params.axis[0].bias_index(p0, r0 + item.key_lo[0]) * table1 + params.axis[1].bias_index(p1, r1 + item.key_lo[1]);
  }
  // to[r][slot][lane] = scale <x_q, y_k> (+ bias) for query rows (p0, block.row(p1, r)), r < count: x in `view`, y staged.
  void products(const View& view, const Block<T>& block, int64_t p0, int64_t p1, int count, const KeyRows* rows,
                int64_t channels, T* columns, const Rows<T>& y, const T* y_columns, T scale, bool with_bias, T* to) {
    const bool bias_in_tile = with_bias && block.fold == 1;
    if (!needs.dots) {
      stage_block(view, p0, p1, count, block, channels, columns);
      scores(block, p0, p1, count, rows, columns, y_columns, channels, scale, bias_in_tile, to);
    }
    if constexpr (kDots) {
      for (int r = 0; needs.dots && r < count; ++r) {
        const int64_t row = block.row(p1, r);
        const S* start = row_start(view, p0, row, block.column);
        const DotLanes<T> lanes = dot_lanes(block, start, lane_steps(view, block), y.step[2]);
        for_rows(rows[r], kernel, [&](int64_t slot, int64_t r0, int64_t r1) {
          stream.next();
          const T* entry = bias_in_tile ? bias + bias_row(p0, row, r0, r1) * bias_pitch + block.bias_base : nullptr;
          dot_scores(block, lanes, y.at(r0, r1, 0), y.step[2], channels, k2, scale, entry, to + (r * slots + slot) * L);
        });
      }
    }
    for (int r = 0; with_bias && !bias_in_tile && r < count; ++r) {
      add_folded_bias(block, p0, block.row(p1, r), rows[r], to + r * slots * L);
    }
  }
  void query_products(const Block<T>& block, int64_t p0, int64_t p1, int count, const KeyRows* rows) {
    products(params.query, block, p0, p1, count, rows, depth, query_columns, key_rows, key_columns,
             static_cast<T>(params.scale), needs.bias, score);
  }
  // score[r][slot][lane] = scale columns_q . columns_k (+ bias) for query rows (p0, block.row(p1, r)), r < count.
  void scores(const Block<T>& block, int64_t p0, int64_t p1, int count, const KeyRows* rows, const T* query, const T* key,
              int64_t channels, T scale, bool with_bias, T* to) {
    ScoreArgs<T> args{};
    args.depth = factors(channels);
    args.pitch = column_pitch;
    args.scale = scale;
    args.key_lanes = &block.key_lanes;
    args.bias_lanes = &block.bias_lanes;
    const int64_t tiles = ceil_div(k2, kSlotTile), tile = ceil_div(k2, tiles);
    int64_t score_start[kRowTile], bias_start[kRowTile] = {};  // of key row (0, 0): the others follow linearly
    for (int r = 0; r < count; ++r) {
      score_start[r] = (r * slots + first_slot(rows[r], kernel, 0, 0)) * L;
      if (with_bias) bias_start[r] = bias_row(p0, block.row(p1, r), 0, 0) * bias_pitch + block.bias_base;
    }
    args.score = to;
    args.bias = with_bias ? bias : no_bias;
    const int64_t key_start = column_lead + block.first[0], key_row_size = args.depth * column_pitch;
    for_shared_rows(rows, count, [&](int64_t r0, int64_t r1, int begin, int end) NATRPB_LAMBDA {
      stream.next();
      args.query = query + begin * args.depth * L;
      args.score_start = score_start + begin;
      args.bias_start = bias_start + begin;
      for (int64_t t = 0; t < k2; t += tile) {
        const int64_t n = min_of(tile, k2 - t), past = (key_start + t) % L;
        const Reach reach = key_reach(block, past, n);
        args.past = past;
        args.key = key + (r0 * item.key_n[1] + r1) * key_row_size + key_start + t - (reach == Reach::kAcross ? past : 0);
        args.score_at = (slots_of(kernel, r0, r1) + t) * L;
        args.bias_at = with_bias ? (r0 * table1 + r1) * bias_pitch + t : 0;
        pick_score_tile<F>(end - begin, static_cast<int>(n), reach)(args);
      }
    });
  }

  // Adds the bias to the scores of a block over two query rows: the second row's table row is the one before.
  void add_folded_bias(const Block<T>& block, int64_t p0, int64_t p1, const KeyRows& rows, T* p) const {
    const auto second = lane_numbers<T>() >= static_cast<CountOf<T>>(block.width);
    for_rows(rows, kernel, [&](int64_t slot, int64_t r0, int64_t r1) {
      const T* table = bias + bias_row(p0, p1, r0, r1) * bias_pitch + block.bias_base;
      for (int64_t t = 0; t < k2; ++t) {
        const Vec<T> first_row = load_lanes<T, Reach::kWithin>(table + t, block.bias_lanes);
        const Vec<T> second_row = load_lanes<T, Reach::kWithin>(table - bias_pitch + t, block.bias_lanes);
        T* score = p + (slot + t) * L;
        store(score, load(score) + (second ? second_row : first_row));
      }
    });
  }

  // Reads one number per live lane from a view with one channel; the other lanes are zero.
  Vec<T> load_scalars(const View& view, int64_t p0, int64_t p1, const Block<T>& block) const {
    return load_numbers<T>(row_address<T>(params, item, view, p0, p1, block.column), lane_steps(view, block), block.live);
  }
  void store_scalars(const View& view, int64_t p0, int64_t p1, const Block<T>& block, Vec<T> v) const {
    store_numbers<T>(row_address<T>(params, item, view, p0, p1, block.column), lane_steps(view, block), block.live, v);
  }
  // Writes factor[lane] * sum_t p[t][lane] * x[t] to the block's queries in `view`, in place or through a tile.
  void store_sums(const View& view, int64_t p0, int64_t p1, const Block<T>& block, const KeyRows& rows, const T* p,
                  const Rows<T>& x, int64_t channels, Vec<T> factor) const {
    S* to = row_start(view, p0, p1, block.column);
    const Steps steps = lane_steps(view, block);
    if constexpr (kPaired) {
      pack_weights(p, block, kernel, weight_pairs);
      p = weight_pairs;
    }
    if constexpr (std::is_same_v<S, T> || kPaired) {
      weighted_sum<F>(p, block, rows, kernel, x, SumTarget<T, S>{to, steps, channels, factor});
    } else {
      weighted_sum<F>(p, block, rows, kernel, x, SumTarget<T, T>{result_tile, padded(channels), padded(channels), factor});
      for (int l = 0; l < block.live; ++l) {
        store_row(result_tile + l * padded(channels), channels, splat(T(1)), to + steps(l));
      }
    }
  }

  // dx += p^T x for `count` query rows of a block, x their natural rows in `view`, times `factor`.
  void scatter_rows(const View& view, int64_t p0, int64_t p1, int count, const Block<T>& block, const KeyRows* rows,
                    int64_t channels, T factor, T* tile, const T* p, const Rows<T>& dx) const {
    ScatterSource<T> x[kRowTile];
    for (int r = 0; r < count; ++r) {
      x[r] = block_rows(view, p0, block.row(p1, r), block, channels, factor, tile + r * L * padded(channels));
    }
    scatter(p, slots * L, block, rows, count, kernel, x, dx);
  }
  // dbias[table row][t][lane] += dscore[slot][lane]; lanes meet in flush_bias, where their table columns are known.
  void add_bias_grad(int64_t p0, int64_t p1, const KeyRows& rows, const T* dp) const {
    const int64_t size = k2 * L;
    for_rows(rows, kernel, [&](int64_t slot, int64_t r0, int64_t r1) NATRPB_LAMBDA {
      T* to = dbias + bias_row(p0, p1, r0, r1) * size;
      const T* from = dp + slot * L;
      for (int64_t i = 0; i < size; i += L) store(to + i, load(to + i) + load(from + i));
    });
  }
  void flush_bias(const Block<T>& block, T* table) const {
    for (int64_t row = 0; row < plan.table / table2; ++row) {
      add_lanes(block, dbias + row * k2 * L, k2, table2, table + row * table2, row > 0);
    }
    clear(dbias, plan.table / table2 * k2 * L);
  }

  // Whether two query rows fill the lanes of one block: short rows, as of small or dilated maps, that all see the same key rows.
  bool folds() const {
    const Interval first = params.axis[1].keys(item.lo[1], item.size[1]),
                   last = params.axis[1].keys(item.hi[1] - 1, item.size[1]);
    return 2 * (item.hi[2] - item.lo[2]) <= L && first.first == last.first && first.last == last.last;
  }

  // Calls row(block, p0, p1, count, rows) for `count` <= kRowTile times `block.fold` query rows from (p0, p1) on, rows[r] being what
  // those from block.row(p1, r) on see, and column_end(block) after each column.
  template <class Row>
  void for_blocks(Row&& row) const {
    for_blocks(row, [](const Block<T>&) {});
  }
  template <class Row, class End>
  void for_blocks(Row&& row, End&& column_end) const {
    const int64_t folded_end = folds() ? item.lo[1] + (item.hi[1] - item.lo[1]) / 2 * 2 : item.lo[1];
    for (int64_t column = item.lo[2], width = 0; column < item.hi[2]; column += width) {
      for (const int fold : {2, 1}) {
        const int64_t begin = fold == 2 ? item.lo[1] : folded_end, end = fold == 2 ? folded_end : item.hi[1];
        if (begin == end) continue;
        const Block<T> block = make_block<T>(params.axis[2], column, item.hi[2], item.size[2], item.key_lo[2], fold);
        for (int64_t p0 = item.lo[0]; p0 < item.hi[0]; ++p0) {
          for (int64_t p1 = begin; p1 < end; p1 += kRowTile * fold) {
            const int count = static_cast<int>(min_of(kRowTile, (end - p1) / fold));
            KeyRows rows[kRowTile];
            for (int r = 0; r < count; ++r) rows[r] = key_rows_of(p0, block.row(p1, r));
            row(block, p0, p1, count, rows);
          }
        }
        column_end(block);
        width = block.width;
      }
    }
  }

  // query or dout of `count` rows as columns [row][channel][lane]
  void stage_block(const View& view, int64_t p0, int64_t p1, int count, const Block<T>& block, int64_t channels,
                   T* columns) const {
    for (int r = 0; r < count; ++r) {
      const int64_t next = block.row(p1, kRowTile + r);
      if (next < item.hi[1]) {
        prefetch_columns(row_start(view, p0, next, block.column), column_step(view), block.width, channels);
      }
      copy_columns<Word>(row_start(view, p0, block.row(p1, r), block.column), lane_steps(view, block), block.live,
                         factors(channels), L, columns + r * factors(channels) * L);
    }
  }

  // ---- ops ----
  void forward() {
    stream.begin(item, params.out, value_depth);
    for_blocks([&](const Block<T>& block, int64_t p0, int64_t p1, int count, const KeyRows* rows) {
      stream.plan(block, p0, p1, count * block.fold);
      query_products(block, p0, p1, count, rows);
      for (int r = 0; r < count; ++r) {
        T* p = score + r * slots * L;
        fill_missing(block, rows[r], kernel, -kInfinity<T>, p);
        stream.next();
        const Softmax<T> softmax = exponentiate(p, slots);
        stream.next();
        store_sums(params.out, p0, block.row(p1, r), block, rows[r], p, value_rows, value_depth, T(1) / softmax.sum);
        store_scalars(params.lse, p0, block.row(p1, r), block, softmax.peak + log<T>(softmax.sum));
      }
    });
  }

  void backward() {
    T* table = bias_part();
    const T scale = static_cast<T>(params.scale);
    stream.begin(item, params.dquery, depth);
    for_blocks(
        [&](const Block<T>& block, int64_t p0, int64_t p1, int count, const KeyRows* rows) {
          stream.plan(block, p0, p1, count * block.fold);
          query_products(block, p0, p1, count, rows);
          products(params.dout, block, p0, p1, count, rows, value_depth, dout_columns, value_rows, value_columns, T(1), false,
                   dscore);
          for (int r = 0; r < count; ++r) {
            T* p = score + r * slots * L;
            T* dp = dscore + r * slots * L;
            fill_missing(block, rows[r], kernel, -kInfinity<T>, p);
            fill_missing(block, rows[r], kernel, T(0), dp);
            differentiate_softmax(load_scalars(params.lse, p0, block.row(p1, r), block),
                                  params.dlse.data ? load_scalars(params.dlse, p0, block.row(p1, r), block) : Vec<T>{}, slots,
                                  p, dp);
            store_sums(params.dquery, p0, block.row(p1, r), block, rows[r], dp, key_rows, depth, splat(scale));
            if (needs.dbias) add_bias_grad(p0, block.row(p1, r), rows[r], dp);
          }
          scatter_rows(params.query, p0, p1, count, block, rows, depth, scale, query_tile, dscore, dkey_rows);
          scatter_rows(params.dout, p0, p1, count, block, rows, value_depth, T(1), dout_tile, score, dvalue_rows);
        },
        [&](const Block<T>& block) {
          if (needs.dbias) flush_bias(block, table);
        });
    store_keys();
  }
  // ---- sums that leave the item ----

  // The item's table in the workspace, cleared.
  T* bias_part() const {
    if (!needs.dbias) return nullptr;
    T* part = static_cast<T*>(params.workspace) + item.index * plan.table;
    clear(part, plan.table);
    clear(dbias, plan.table / table2 * k2 * L);
    return part;
  }

  // Whether dkey or dvalue take an item's sums as they grow. NB: sums that meet others leave in the compute type, so that they
  // are rounded once.
  bool sums_in_place(const View& view, int64_t channels) const {
    return (plan.keys_shared() || std::is_same_v<S, T>) && channels % L == 0 && is_near(view, channels);
  }

  // Calls key(address in view, r0, r1, column, whether nothing was added there before) for the item's keys.
  template <class Out, class Body>
  void for_keys(const View& view, Body&& key) const {
    const Interval fresh[kAxes] = {item.fresh(params.axis, 0), item.fresh(params.axis, 1), item.fresh(params.axis, 2)};
    const int64_t step = column_step(view);
    for_key_rows([&](int64_t r0, int64_t r1) {
      Out* row = row_address<Out>(params, item, view, item.key_lo[0] + r0, item.key_lo[1] + r1, item.key_lo[2]);
      const bool fresh_row = fresh[0].contains(r0) && fresh[1].contains(r1);
      for (int64_t column = 0; column < item.key_n[2]; ++column) {
        key(row + column * step, r0, r1, column, fresh_row && fresh[2].contains(column));
      }
    });
  }
  // Points `rows` at where the item's sums grow, from zero or from what an earlier color left.
  void start_sums(const View& view, int64_t channels, T* dense, Rows<T>& rows) const {
    if (!sums_in_place(view, channels)) {
      rows.data = dense;
      layout_rows(channels, item.key_n[2], rows);
      return clear(dense, item.keys() * rows.channels);
    }
    place_rows(view, channels, rows);
    for_keys<T>(view, [&](T* to, int64_t, int64_t, int64_t, bool fresh) {
      for (int64_t c = 0; fresh && c < channels; c += L) store(to + c, Vec<T>{});
    });
  }
  // Brings sums that did not grow in place to the tensor.
  template <class Out>
  void add_keys(const View& view, int64_t channels, const Rows<T>& rows) const {
    for_keys<Out>(view, [&](Out* to, int64_t r0, int64_t r1, int64_t column, bool fresh) {
      const T* from = rows.at(r0, r1, column);
      fresh ? store_row(from, channels, splat(T(1)), to) : add_row(from, channels, splat(T(1)), to);
    });
  }
  void finish_sums(const View& view, int64_t channels, const Rows<T>& rows) const {
    if (sums_in_place(view, channels)) return;
    plan.keys_shared() ? add_keys<T>(view, channels, rows) : add_keys<S>(view, channels, rows);
  }
  void store_keys() const {
    if (needs.dkey) finish_sums(params.dkey, depth, dkey_rows);
    if (needs.dvalue) finish_sums(params.dvalue, value_depth, dvalue_rows);
  }
};
