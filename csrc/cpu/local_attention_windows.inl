// Fused attention where the queries of a window see all its keys, which are the same positions: every step is a product of small
// matrices. A window's rows are gathered; scores lie as [key][query], a few vectors of queries at a time, so that softmax goes lane
// by lane.
//
//   forward    s = bias + scale k q^T,  p = softmax(s),  out = p^T v
//   backward   dp = v dout^T,  ds = p (dp - delta),  dq = scale ds^T k,  dk = scale ds q,  dv = p dout,  dbias += ds
//
// Bytes: every tensor is read or written once. Scores, and the bias and its gradient spread to their shape, live in scratch memory.

// F is what products are made of, as in Worker. NB: loops have the members that they need in local variables: a vector store may change
// any member, for all that the compiler knows.
template <class S, class F = Compute<S>>
struct WindowWorker {
  using T = Compute<S>;
  using Word = std::conditional_t<std::is_same_v<F, T>, S, F>;  // F in storage
  static constexpr int L = kLanes<T>;
  static constexpr bool kPaired = kNumbers<F> == 2;
  static constexpr int64_t kWidth = 4 * L;  // queries whose scores are in memory at a time

  const LocalAttentionParams& params;
  const Plan& plan;
  Item item;
  Window shape{};                                         // what bias and dbias are laid out for
  int64_t positions, lanes;                               // of that shape, and padded to whole vectors
  int64_t scored;                                         // lanes, without those of a last query that has a vector to itself
  int64_t width;                                          // of the parts that scores are formed in
  int64_t calls;                                          // tiles of its products
  const int64_t depth, value_depth;                       // D, Dv
  const int64_t key_pitch, value_pitch;                   // of natural rows, in factors
  const int64_t sum_pitch;                                // of results, in channels
  T *query, *key, *value, *dout;                          // natural rows; of queries, zero behind the last
  T *query_columns, *dout_columns;                        // [factor][lanes]
  T *query_words, *key_words, *value_words, *dout_words;  // rows that sums are made of: the natural ones, or of two rows' pairs
  T *score, *dscore;                                      // [key][width]
  T *weights, *weight_rows;                               // pairs of scores, and their transpose [query][pair of keys]
  T *bias, *dbias;                                        // [key][lanes]
  T* dbias_rows;                                          // of one column of keys, [row of the table][query], whole vectors
  T *bias_table, *dbias_table;                            // a head's, each row backwards: as the queries of a row go forwards
  T *result, *dkey, *dvalue;                              // [position][sum_pitch]
  T *lse, *dlse, *inverse_sum;                            // [lanes]
  T *lone_bias, *lone_score, *lone_dscore;                // of a lone query, [key]
  Ahead<S> ahead;
  size_t bytes;

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }
  static int64_t factors(int64_t channels) { return channels / kNumbers<F>; }

  WindowWorker(const LocalAttentionParams& p, const Plan& pl, bool backward, void* scratch)
      : params(p),
        plan(pl),
        depth(p.head_dim),
        value_depth(p.value_dim),
        key_pitch(padded(factors(depth))),
        value_pitch(padded(factors(value_depth))),
        sum_pitch(padded(max_of(depth, value_depth))),
        ahead(p, backward) {
    int64_t most = 1;
    for (const Axis& axis : params.axis) most *= min_of(axis.kernel_size, axis.group_length(0));
    const int64_t n = padded(most), scores = n * min_of(n, kWidth), sums = n * sum_pitch, pairs = padded(n / 2) * sum_pitch;
    Arena arena(scratch);
    const auto take = [&](bool wanted, int64_t count) { return wanted ? arena.take<T>(count) : nullptr; };
    query = take(true, n * key_pitch);
    key = take(true, n * key_pitch);
    value = take(true, n * value_pitch);
    dout = take(backward, n * value_pitch);
    query_columns = take(true, key_pitch * n);
    dout_columns = take(backward, value_pitch * n);
    query_words = kPaired ? take(backward, pairs) : query;
    key_words = kPaired ? take(backward, pairs) : key;
    value_words = kPaired ? take(!backward, pairs) : value;
    dout_words = kPaired ? take(backward, pairs) : dout;
    score = take(true, scores);
    dscore = take(backward, scores);
    weights = take(kPaired, scores);
    weight_rows = take(kTiles, scores);
    bias = take(params.rpb, n * n + L);
    dbias = take(backward && params.drpb, n * n + L);
    dbias_rows = take(backward && params.drpb, plan.table / table_row_size() * padded(params.axis[2].kernel_size));
    bias_table = take(params.rpb, plan.table + L);
    dbias_table = take(backward && params.drpb, plan.table + L);
    result = take(true, sums);
    dkey = take(backward, sums);
    dvalue = take(backward, sums);
    lse = take(true, n);
    dlse = take(backward, n);
    inverse_sum = take(!backward, n);
    lone_bias = take(params.rpb, n);
    lone_score = take(true, n);
    lone_dscore = take(backward, n);
    bytes = arena.used();
  }

  bool begin(int64_t index) {
    item = locate(params, plan, index);
    shape = {};
    positions = 0;
    if (item.empty) return false;
    if (bias) turn_table(static_cast<const T*>(params.rpb) + item.head * plan.table, bias_table);
    if (dbias) clear(dbias_table, plan.table);
    return true;
  }

  // ---- windows ----

  // Calls body(window) for the windows of `box` until it returns false; those of one shape together, where most of them are.
  template <class Body>
  void for_windows(const Item& box, Body&& body) const {
    const auto along = [&](int axis, auto&& next) NATRPB_LAMBDA {
      for (int64_t p = box.lo[axis]; p < box.hi[axis];) {
        const Interval keys = params.axis[axis].keys(p, box.size[axis]);
        if (!next(keys)) return false;
        p = keys.last + 1;
      }
      return true;
    };
    for (const bool clipped : {false, true}) {
      const bool all = along(2, [&](Interval columns) {
        return along(0, [&](Interval planes) {
          return along(1, [&](Interval rows) {
            const Window window{{planes.first, rows.first, columns.first}, {planes.count(), rows.count(), columns.count()}};
            return (window.positions() < plan.slots) != clipped || body(window);
          });
        });
      });
      if (!all) return;
    }
  }
  // Calls body(window) for the item's windows; what it writes and what the next one reads is asked for in `calls` of ahead.next().
  template <int OUTPUTS, int INPUTS, class Body>
  void for_windows(const Tensor (&outputs)[OUTPUTS], const Tensor (&inputs)[INPUTS], Body&& body) {
    Window window{};
    const auto work = [&](const Item& next_item, const Window& next) {
      if (!window.has_shape_of(shape)) begin_shape(window);
      ahead.begin(calls);
      for (const Tensor& tensor : outputs) ahead.add(item, window, tensor);
      for (const Tensor& tensor : inputs) ahead.add(next_item, next, tensor);
      body(window);
    };
    for_windows(item, [&](const Window& next) {
      if (window.positions()) work(item, next);
      window = next;
      return true;
    });
    Item next_item{};
    Window next{};
    if (item.index + 1 < plan.items) next_item = locate(params, plan, item.index + 1);
    for_windows(next_item, [&](const Window& first) {
      next = first;
      return false;
    });
    work(next_item, next);
  }

  // Calls run(address of the first, its number, how many) for neighboring positions of a window on axis 2; they lie `column_step(view)` apart.
  template <class Out, class Run>
  void for_runs(const Window& window, const View& view, Run&& run) const {
    const int64_t count0 = window.count[0], count1 = window.count[1], count2 = window.count[2];
    const int64_t step0 = step_of(params, view, 0), step1 = step_of(params, view, 1);
    Out* plane = row_address<Out>(params, item, view, window.first[0], window.first[1], window.first[2]);
    int64_t at = 0;
    for (int64_t i = 0; i < count0; ++i, plane += step0) {
      Out* row = plane;
      for (int64_t j = 0; j < count1; ++j, row += step1, at += count2) run(row, at, count2);
    }
  }
  int64_t column_step(const View& view) const { return step_of(params, view, 2); }

  void load_rows(const Window& window, const View& view, int64_t channels, int64_t pitch, T* to) const {
    const int64_t words = factors(channels), step = column_step(view);
    for_runs<S>(window, view, [&](const S* from, int64_t at, int64_t count) NATRPB_LAMBDA {
      T* copy = to + at * pitch;
      for (int64_t i = 0; i < count; ++i, from += step, copy += pitch) {
        const Word* row = reinterpret_cast<const Word*>(from);
        int64_t c = 0;
        for (; c + L <= words; c += L) store(copy + c, load_as<T>(row + c));
        if (c < words) store(copy + c, load_part<T>(row + c, words - c));
      }
    });
  }
  // Writes rows [position][sum_pitch] to `view`, times factor(row).
  template <class Factor>
  void store_rows(const T* rows, const Window& window, const View& view, int64_t channels, Factor&& factor) const {
    const int64_t step = column_step(view), pitch = sum_pitch;
    for_runs<S>(window, view, [&](S* to, int64_t at, int64_t count) NATRPB_LAMBDA {
      for (int64_t i = at; i < at + count; ++i, to += step) store_row(rows + i * pitch, channels, splat(factor(i)), to);
    });
  }
  // One number per position; those behind the last are `rest`.
  void load_numbers_of(const Window& window, const View& view, T rest, T* to) const {
    const int64_t step = column_step(view);
    for_runs<T>(window, view, [&](const T* from, int64_t at, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to[at + i] = from[i * step];
    });
    for (int64_t i = positions; i < lanes; ++i) to[i] = rest;
  }
  void store_numbers_of(const Window& window, const View& view, const T* numbers) const {
    const int64_t step = column_step(view);
    for_runs<T>(window, view, [&](T* to, int64_t at, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to[i * step] = numbers[at + i];
    });
  }
  void transpose_rows(const T* rows, int64_t pitch, int64_t words, T* columns) const {
    copy_columns<T>(rows, pitch, scored, words, lanes, columns);
  }

  // ---- bias ----

  // to = a head's table with every row backwards; and back again.
  void turn_table(const T* table, T* to) const {
    const int64_t size = table_row_size();
    for (int64_t row = 0; row < plan.table; row += size) {
      for (int64_t i = 0; i < size; ++i) to[row + i] = table[row + size - 1 - i];
    }
  }
  // Calls body(number of the first query, row of the table) for every row of queries on axis 2 and the keys at (k0, k1).
  template <class Body>
  NATRPB_INLINE void for_bias_rows(int64_t k0, int64_t k1, Body&& body) const {
    const Axis axis0 = params.axis[0], axis1 = params.axis[1];
    const int64_t size1 = 2 * axis1.kernel_size - 1;
    const Window window = shape;
    int64_t query = 0;
    for (int64_t q0 = 0; q0 < window.count[0]; ++q0) {
      for (int64_t q1 = 0; q1 < window.count[1]; ++q1, query += window.count[2]) {
        body(query, axis0.bias_index(q0, k0) * size1 + axis1.bias_index(q1, k1));
      }
    }
  }
  int64_t table_row_size() const { return 2 * params.axis[2].kernel_size - 1; }
  // Where in a turned table's row the first query of a row finds the key k2; the next ones follow.
  int64_t entry_in_row(int64_t k2) const { return table_row_size() - 1 - params.axis[2].bias_index(0, k2); }

  void spread_bias() const {
    const int64_t columns = shape.count[2], size = table_row_size();
    T* to = bias;
    for (int64_t k0 = 0; k0 < shape.count[0]; ++k0) {
      for (int64_t k1 = 0; k1 < shape.count[1]; ++k1) {
        for (int64_t k2 = 0; k2 < columns; ++k2, to += lanes) {
          const T* entries = bias_table + entry_in_row(k2);
          for_bias_rows(k0, k1, [&](int64_t query, int64_t row) NATRPB_LAMBDA {
            // NB: whole vectors; the next row, or the next loop, overwrites what is too much
            for (int64_t i = 0; i < columns; i += L) store(to + query + i, load(entries + row * size + i));
          });
        }
      }
    }
    const int64_t live = positions + L - lanes;  // of the last vector
    if (live == L) return;
    for (T* last = bias + lanes - L; last < to; last += lanes) store(last, load_part<T>(last, live));
  }
  // Adds dbias to the head's table, one column of keys after the other: its rows meet in whole vectors of their own first, as vectors
  // stored in part, or over a part of others, cannot be loaded again soon.
  void flush_bias() const {
    if (!dbias || positions == 0) return;
    const int64_t columns = shape.count[2], pitch = padded(columns), rows = plan.table / table_row_size();
    for (int64_t k2 = 0; k2 < columns; ++k2) {
      clear(dbias_rows, rows * pitch);
      const T* from = dbias + k2 * lanes;
      for (int64_t k0 = 0; k0 < shape.count[0]; ++k0) {
        for (int64_t k1 = 0; k1 < shape.count[1]; ++k1, from += columns * lanes) {
          for_bias_rows(k0, k1, [&](int64_t query, int64_t row) NATRPB_LAMBDA {
            T* to = dbias_rows + row * pitch;
            for (int64_t i = 0; i < columns; i += L) store(to + i, load(to + i) + load(from + query + i));
          });
        }
      }
      T* to = dbias_table + entry_in_row(k2);
      for (int64_t row = 0; row < rows; ++row, to += table_row_size()) {
        add_row(dbias_rows + row * pitch, columns, splat(T(1)), to);
      }
    }
  }

  // Lays bias and dbias out for windows of the shape of `window`.
  void begin_shape(const Window& window) {
    flush_bias();
    shape = window;
    positions = window.positions();
    lanes = padded(positions);
    scored = positions > L && positions % L == 1 ? positions - 1 : lanes;
    width = min_of(lanes, kWidth);
    const auto tiles = [&](int64_t columns) {
      return ceil_div(positions, kProductRows) * ceil_div(columns, kProductVectors * L);
    };
    calls = dout ? 2 * (tiles(scored) + tiles(depth)) + tiles(value_depth) : tiles(scored) + tiles(value_depth);
    const int64_t rest = lanes - positions;
    clear(query + positions * key_pitch, rest * key_pitch);
    if (dout) clear(dout + positions * value_pitch, rest * value_pitch);
    if (kTiles) clear_tails();
    if (dbias) clear(dbias, positions * lanes);
    if (!bias) return;
    spread_bias();
    if (scored == lanes) return;
    for (int64_t k = 0; k < positions; ++k) lone_bias[k] = bias[k * lanes + positions - 1];
  }
  // What only whole tiles of products read.
  void clear_tails() const {
    const auto clear_rows = [](T* rows, int64_t used, int64_t pitch) {
      if (rows) clear(rows + used * pitch, (padded(used) - used) * pitch);
    };
    clear_rows(query_columns, factors(depth), lanes);
    clear_rows(dout_columns, factors(value_depth), lanes);
    const int64_t pairs = ceil_div(positions, 2);
    clear_rows(query_words, pairs, padded(depth));
    clear_rows(key_words, pairs, padded(depth));
    clear_rows(value_words, pairs, padded(value_depth));
    clear_rows(dout_words, pairs, padded(value_depth));
  }

  // ---- products ----

  // Some of a window's queries.
  struct Part {
    int64_t begin, live;
    int64_t lanes;   // live, padded to whole vectors
    int64_t scored;  // of these, without a lone query's
  };
  template <class Body>
  void for_parts(Body&& body) const {
    for (int64_t q = 0; q < positions; q += width) {
      body(Part{q, min_of(width, positions - q), min_of(width, lanes - q), min_of(width, scored - q)});
    }
  }

  // to[key][query] = start + scale * sum_c rows[key][c] columns[c][query]
  void score_pairs(const Part& part, const T* rows, int64_t pitch, const T* columns, int64_t words, T scale, const T* start,
                   T* to) {
    constexpr int64_t kRun = 32;
    Product<T> m{rows, pitch, columns + part.begin, lanes, words, to, width, scale, start, lanes};
    if (start) m.start += part.begin;
    product<Order::kRows>(m, positions, part.scored, kRun);
  }
  // result[query] = sum_k p[key][query] rows[key]
  void sum_keys(const Part& part, const T* p, const T* rows, int64_t channels) {
    const int64_t words = ceil_div(positions, kNumbers<F>), pitch = padded(channels);
    Product<T> m{p, width, rows, pitch, words, result + part.begin * sum_pitch, sum_pitch, T(1), nullptr, 0};
    if constexpr (kPaired) {
      pair_keys(p, width, positions, part.lanes, weights);
      m.a = weights;
    }
    if constexpr (kTiles) {
      clear(weights + words * width, (padded(words) - words) * width);
      copy_columns<T>(weights, width, padded(words), part.lanes, padded(words), weight_rows);
      m.a = weight_rows;
      m.a_step = padded(words);
    }
    product<Order::kColumns>(m, part.live, pitch, words);
  }
  // sums[key] (+)= sum_q p[key][query] rows[query]
  void sum_queries(const Part& part, const T* p, const T* rows, int64_t channels, T* sums) {
    const int64_t words = ceil_div(part.live, kNumbers<F>), pitch = padded(channels);
    const T* from = rows + part.begin / kNumbers<F> * pitch;
    Product<T> m{p, width, from, pitch, words, sums, sum_pitch, T(1), part.begin ? sums : nullptr, sum_pitch};
    if constexpr (kPaired) {
      pair_queries(p, width, positions, part.live, weights);
      m.a = weights;
      m.a_step = padded(width / 2);
    }
    product<Order::kRows>(m, positions, pitch, words);
  }
  template <Order O>
  void product(const Product<T>& m, int64_t rows, int64_t columns, int64_t run) {
    const auto between = [&] { ahead.next(); };
    if constexpr (kTiles) {
      multiply_by_tiles(m, rows, columns, between);
    } else {
      multiply<F, O>(m, rows, columns, run, between);
    }
  }

  // ---- a lone query: its keys are lanes while its scores become weights, then these become a column of all queries' ----

  // to[key] = start[key] + scale <row, rows[key]>; `rest` behind the last key
  void score_lone(const T* row, const T* rows, int64_t pitch, T scale, const T* start, T rest, T* to) const {
    const int64_t last = positions - 1;  // the only one of its vector, too
    const auto write = [&](int64_t k, Vec<T> dots)
                           NATRPB_LAMBDA { store(to + k, start ? load(start + k) + scale * dots : scale * dots); };
    for (int64_t k = 0; k < last; k += L) {
      Vec<T> sums[L] = {};
      for (int64_t c = 0; c < pitch; c += L) {
        const Vec<T> factor = load(row + c);
        const T* from = rows + k * pitch + c;
        NATRPB_UNROLL for (int i = 0; i < L; ++i, from += pitch) sums[i] = multiply_add<F>(sums[i], factor, load(from));
      }
      write(k, sums_of<T>(sums));
    }
    Vec<T> sum{};
    for (int64_t c = 0; c < pitch; c += L) sum = multiply_add<F>(sum, load(row + c), load(rows + last * pitch + c));
    write(last, splat(sum_of<T>(sum)));
    store(to + last, lane_numbers<T>() == 0 ? load(to + last) : splat(rest));
  }
  void copy_lone(const Part& part, const T* from, T* to) const {
    const int64_t step = width;
    to += part.live - 1;
    for (int64_t k = 0; k < positions; ++k) to[k * step] = from[k];
  }
  const T* last_of(const T* rows, int64_t pitch) const { return rows + (positions - 1) * pitch; }

  void weigh_lone(const Part& part) const {
    score_lone(last_of(query, key_pitch), key, key_pitch, static_cast<T>(params.scale), lone_bias, -kInfinity<T>, lone_score);
    Vec<T> most = load(lone_score);
    for (int64_t k = L; k < lanes; k += L) most = max<T>(most, load(lone_score + k));
    const T largest = largest_of<T>(most), peak = largest - largest == T(0) ? largest : T(0);  // as in exponentiate()
    Vec<T> total{};
    for (int64_t k = 0; k < lanes; k += L) {
      const Vec<T> e = exp<T>(load(lone_score + k) - peak);
      store(lone_score + k, e);
      total += e;
    }
    const T sum = sum_of<T>(total);
    inverse_sum[positions - 1] = T(1) / sum;
    lse[positions - 1] = peak + log<T>(splat(sum))[0];
    copy_lone(part, lone_score, score);
  }
  void differentiate_lone(const Part& part) const {
    score_lone(last_of(query, key_pitch), key, key_pitch, static_cast<T>(params.scale), lone_bias, -kInfinity<T>, lone_score);
    score_lone(last_of(dout, value_pitch), value, value_pitch, T(1), nullptr, T(0), lone_dscore);
    Vec<T> total{};
    for (int64_t k = 0; k < lanes; k += L) {
      const Vec<T> weight = exp<T>(load(lone_score + k) - lse[positions - 1]);
      store(lone_score + k, weight);
      total += weight * load(lone_dscore + k);
    }
    const T delta = sum_of<T>(total) - dlse[positions - 1];
    for (int64_t k = 0; k < lanes; k += L) {
      store(lone_dscore + k, load(lone_score + k) * (load(lone_dscore + k) - delta));
    }
    copy_lone(part, lone_score, score);
    copy_lone(part, lone_dscore, dscore);
  }

  // ---- ops ----
  void forward() {
    const Tensor outputs[] = {{&params.out, value_depth}};
    const Tensor inputs[] = {{&params.query, depth}, {&params.key, depth}, {&params.value, value_depth}};
    for_windows(outputs, inputs, [&](const Window& window) {
      load_rows(window, params.query, depth, key_pitch, query);
      load_rows(window, params.key, depth, key_pitch, key);
      load_rows(window, params.value, value_depth, value_pitch, value);
      if constexpr (kPaired) pair_rows(value, value_pitch, positions, value_depth, value_words);
      transpose_rows(query, key_pitch, factors(depth), query_columns);
      for_parts([&](const Part& part) {
        score_pairs(part, key, key_pitch, query_columns, factors(depth), static_cast<T>(params.scale), bias, score);
        for (int64_t q = 0; q < part.scored; q += L) {
          const Softmax<T> softmax = exponentiate(score + q, positions, width);
          store(inverse_sum + part.begin + q, T(1) / softmax.sum);
          store(lse + part.begin + q, softmax.peak + log<T>(softmax.sum));
        }
        if (part.scored < part.lanes) weigh_lone(part);
        sum_keys(part, score, value_words, value_depth);
      });
      store_rows(result, window, params.out, value_depth, [&](int64_t query) { return inverse_sum[query]; });
      store_numbers_of(window, params.lse, lse);
    });
  }

  void backward() {
    const T scale = static_cast<T>(params.scale);
    const Tensor outputs[] = {{&params.dquery, depth}, {&params.dkey, depth}, {&params.dvalue, value_depth}};
    const Tensor inputs[] = {
        {&params.query, depth}, {&params.key, depth}, {&params.value, value_depth}, {&params.dout, value_depth}};
    for_windows(outputs, inputs, [&](const Window& window) {
      load_rows(window, params.query, depth, key_pitch, query);
      load_rows(window, params.key, depth, key_pitch, key);
      load_rows(window, params.value, value_depth, value_pitch, value);
      load_rows(window, params.dout, value_depth, value_pitch, dout);
      load_numbers_of(window, params.lse, kInfinity<T>, lse);  // weights of zero behind the last query
      transpose_rows(query, key_pitch, factors(depth), query_columns);
      transpose_rows(dout, value_pitch, factors(value_depth), dout_columns);
      if constexpr (kPaired) {
        pair_rows(query, key_pitch, positions, depth, query_words);
        pair_rows(key, key_pitch, positions, depth, key_words);
        pair_rows(dout, value_pitch, positions, value_depth, dout_words);
      }
      if (params.dlse.data) {
        load_numbers_of(window, params.dlse, T(0), dlse);
      } else {
        clear(dlse, lanes);
      }
      for_parts([&](const Part& part) {
        score_pairs(part, key, key_pitch, query_columns, factors(depth), scale, bias, score);
        score_pairs(part, value, value_pitch, dout_columns, factors(value_depth), T(1), nullptr, dscore);
        for (int64_t q = 0; q < part.scored; q += L) {
          differentiate_softmax(load(lse + part.begin + q), load(dlse + part.begin + q), positions, score + q, dscore + q,
                                width);
        }
        if (part.scored < part.lanes) differentiate_lone(part);
        if (dbias) add_bias_grad(part);
        sum_keys(part, dscore, key_words, depth);
        sum_queries(part, dscore, query_words, depth, dkey);
        sum_queries(part, score, dout_words, value_depth, dvalue);
      });
      const auto scaled = [&](int64_t) { return scale; };
      store_rows(result, window, params.dquery, depth, scaled);
      store_rows(dkey, window, params.dkey, depth, scaled);
      store_rows(dvalue, window, params.dvalue, value_depth, [](int64_t) { return T(1); });
    });
    if (!dbias) return;
    flush_bias();
    turn_table(dbias_table, static_cast<T*>(params.workspace) + item.index * plan.table);
  }
  void add_bias_grad(const Part& part) const {
    const int64_t to_step = lanes, from_step = width;
    T* to = dbias + part.begin;
    const T* from = dscore;
    for (int64_t k = positions; k > 0; --k, to += to_step, from += from_step) {
      for (int64_t q = 0; q < part.lanes; q += L) store(to + q, load(to + q) + load(from + q));
    }
  }
};
