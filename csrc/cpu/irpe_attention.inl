// One item of attention with image relative position encodings: a block of queries of one (batch, head) against all keys.
//
// Keys come in chunks, staged in scratch memory in the compute type: transposed for scores, natural rows for weighted sums.
// For each chunk the queries come in windows of up to kMostQueries; a window's scores, [query][key], are the only place where
// pairs exist. The forward pass keeps its softmax running over the chunks; the backward pass takes lse and
// delta = sum_k p dp - dlse = <dout, out> + <dbinned, binned> - dlse from the forward's results, so it sees each pair once.
//
// Bytes: query, key, value and rows of encodings are read once per block of queries, the index maps once per (batch, head),
// results written once. Two matrix products in the forward pass, five in the backward.

// The most keys of a chunk: what is staged of them should stay in a core's second-level cache.
inline constexpr int64_t kMostKeys = 256;

template <class S>
struct IrpeAttention {
  using T = Compute<S>;
  static constexpr int L = kLanes<T>;

  const IrpeAttentionParams& params;
  const IrpePlan& plan;
  const int64_t depth, value_depth, pitch, vpitch;   // D, Dv, padded to whole vectors
  const int64_t pitch_k, pitch_q, pitch_t, pitch_v;  // of rows of buckets
  const int64_t chunk;                               // most keys of a chunk, whole vectors
  const int64_t tall;                                // most queries of a window
  int64_t item, batch, head, first, count;           // the item's queries are first .. first + count - 1

  // Of a chunk's keys.
  T *key_columns, *value_columns;   // [D][chunk], [Dv][chunk]
  T *key_rows, *value_rows;         // [chunk][pitch], [chunk][vpitch]
  T* key_buckets;                   // [chunk][pitch_q]
  T *dkey, *dvalue, *dkey_buckets;  // as key_rows, value_rows, key_buckets
  T* closed;                        // [chunk], 1 where no query sees the key
  // Of a window's queries.
  T *query, *dout;              // [tall][pitch], scaled; [tall][vpitch]
  T *query_buckets, *dbinned;   // [tall][pitch_k], [tall][pitch_v]
  T *p, *ds;                    // [tall][chunk]
  T *bins_k, *bins_t, *bins_v;  // [2 kBinRows][pitch_k], ...
  // Of all the item's queries.
  T *peak, *sum;               // [block], of the softmax so far
  T *lse, *delta;              // [block]
  T *out, *binned;             // [block][vpitch], [block][pitch_v]
  T *dquery, *dquery_buckets;  // [block][pitch], [block][pitch_k]
  T* table;                    // [pitch_t]
  size_t bytes;

  static int64_t padded(int64_t n) { return ceil_div(n, L) * L; }
  static int64_t share(int64_t n, int64_t most) { return n ? ceil_div(n, ceil_div(n, most)) : 1; }

  IrpeAttention(const IrpeAttentionParams& given, const IrpePlan& cut, IrpeOp op, int64_t index, void* scratch)
      : params(given),
        plan(cut),
        depth(given.head_dim),
        value_depth(given.value_dim),
        pitch(padded(depth)),
        vpitch(padded(value_depth)),
        pitch_k(row_pitch<T>(given.index_k.buckets)),
        pitch_q(row_pitch<T>(given.index_q.buckets)),
        pitch_t(row_pitch<T>(given.index_t.buckets)),
        pitch_v(row_pitch<T>(given.index_v.buckets)),
        chunk(padded(share(given.keys, kMostKeys))),
        tall(ceil_div(share(cut.block_size, kMostQueries), kTileRows) * kTileRows),
        item(index) {
    static_assert(kMostQueries % kTileRows == 0);
    const bool forward = op == IrpeOp::kForward, backward = !forward;
    const int64_t pair = item / plan.blocks, block = plan.block_size;
    batch = pair / params.heads;
    head = pair % params.heads;
    first = item % plan.blocks * block;
    count = max_of(0, min_of(block, params.queries - first));
    Arena arena(scratch);
    const auto take = [&](bool wanted, int64_t elements) { return wanted ? arena.take<T>(elements) : nullptr; };
    key_columns = take(true, depth * chunk);
    value_columns = take(backward, value_depth * chunk);
    key_rows = take(backward, chunk * pitch);
    value_rows = take(forward, chunk * vpitch);
    key_buckets = take(true, chunk * pitch_q);
    dkey = take(backward, chunk * pitch);
    dvalue = take(backward, chunk * vpitch);
    dkey_buckets = take(backward, chunk * pitch_q);
    closed = take(true, chunk);
    query = take(true, tall * pitch);
    dout = take(backward, tall * vpitch);
    query_buckets = take(true, tall * pitch_k);
    dbinned = take(backward, tall * pitch_v);
    p = take(true, tall * chunk);
    ds = take(backward, tall * chunk);
    bins_k = take(backward, 2 * kBinRows * pitch_k);
    bins_t = take(backward, 2 * kBinRows * pitch_t);
    bins_v = take(forward, 2 * kBinRows * pitch_v);
    peak = take(forward, block);
    sum = take(forward, block);
    lse = take(backward, block);
    delta = take(backward, block);
    out = take(forward, block * vpitch);
    binned = take(forward, block * pitch_v);
    dquery = take(backward, block * pitch);
    dquery_buckets = take(backward, block * pitch_k);
    table = take(true, pitch_t);
    bytes = arena.used();
  }

  // ---- staging ----

  S* row(const RowsView& m, int64_t r) const { return static_cast<S*>(m.data) + m.offset(batch, head, r); }
  T* wide_row(const RowsView& m, int64_t r) const { return static_cast<T*>(m.data) + m.offset(batch, head, r); }

  // to[i][c] = factor * m[begin + i][c], zero from `columns` to `to_pitch`
  void stage_rows(const RowsView& m, int64_t begin, int64_t rows, int64_t columns, T factor, int64_t to_pitch, T* to) const {
    for (int64_t i = 0; i < rows; ++i, to += to_pitch) {
      const S* from = row(m, begin + i);
      for (int64_t c = 0; c < to_pitch; c += L) {
        store(to + c, c < columns ? load_channels<T>(from + c, columns - c) * factor : Vec<T>{});
      }
    }
  }
  // m[begin + i][c] = factor * from[i][c]
  void store_rows(const RowsView& m, int64_t begin, int64_t rows, int64_t columns, T factor, int64_t pitch_,
                  const T* from) const {
    for (int64_t i = 0; i < rows; ++i) store_row(from + i * pitch_, columns, splat(factor), row(m, begin + i));
  }

  void stage_table() const {
    if (!params.table) return;
    clear(table, pitch_t);
    const int64_t entries = params.index_t.buckets;
    __builtin_memcpy(table, static_cast<const T*>(params.table) + head * entries, static_cast<size_t>(entries) * sizeof(T));
  }

  // Keys behind the last and padded keys count as closed; NB: nothing is read of padded ones, their copies are zero.
  void stage_closed(const Window& w) const {
    const uint8_t* mask = params.key_padding_mask;
    if (mask) mask += batch * params.keys + w.first_key;
    for (int64_t k = 0; k < chunk; ++k) closed[k] = k >= w.keys || (mask && mask[k]) ? T(1) : T(0);
  }
  void clear_padded(const Window& w, int64_t row_size, T* rows) const {
    if (!params.key_padding_mask) return;
    for (int64_t k = 0; k < w.keys; ++k) {
      if (closed[k] != T(0)) clear(rows + k * row_size, row_size);
    }
  }
  void stage_columns(const RowsView& m, const Window& w, int64_t channels, T* to) const {
    copy_columns<S>(row(m, w.first_key), m.row, w.keys, channels, chunk, to);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = padded(w.keys); k < chunk; k += L) store(to + c * chunk + k, Vec<T>{});
    }
    if (!params.key_padding_mask) return;
    for (int64_t k = 0; k < w.keys; ++k) {
      for (int64_t c = 0; closed[k] != T(0) && c < channels; ++c) to[c * chunk + k] = T(0);
    }
  }
  void stage_keys(const Window& w, bool backward) const {
    stage_closed(w);
    stage_columns(params.key, w, depth, key_columns);
    if (backward) {
      stage_columns(params.value, w, value_depth, value_columns);
      stage_rows(params.key, w.first_key, w.keys, depth, T(1), pitch, key_rows);
      clear_padded(w, pitch, key_rows);
    } else {
      stage_rows(params.value, w.first_key, w.keys, value_depth, T(1), vpitch, value_rows);
      clear_padded(w, vpitch, value_rows);
    }
    if (params.index_q.buckets) {
      stage_rows(params.key_rows, w.first_key, w.keys, params.index_q.buckets, T(1), pitch_q, key_buckets);
      clear(key_buckets + w.keys * pitch_q, (chunk - w.keys) * pitch_q);
    }
  }

  // Calls on_chunk(window), then on_window(window) for the item's queries in turn, then after_chunk(window), chunk by chunk.
  template <class Before, class Body, class After>
  void for_windows(Before&& before, Body&& body, After&& after) const {
    for (int64_t key = 0; key < params.keys; key += chunk) {
      Window w{first, key, 0, min_of(chunk, params.keys - key), params.queries, params.keys};
      before(w);
      for (int64_t q = 0; q < count; q += tall) {
        w.first_query = first + q;
        w.queries = min_of(tall, count - q);
        body(w);
      }
      after(w);
    }
  }

  // ---- scores ----

  // p = scores of the window, before masks
  void scores(const Window& w) const {
    stage_rows(params.query, w.first_query, w.queries, depth, static_cast<T>(params.scale), pitch, query);
    multiply<T>(w.queries, chunk, depth, {query, pitch, 1}, key_columns, chunk, p, chunk, false);
    if (params.index_k.buckets) {
      stage_rows(params.query_rows, w.first_query, w.queries, params.index_k.buckets, T(1), pitch_k, query_buckets);
      add_rows(params.index_k, w, query_buckets, pitch_k, p, chunk);
    }
    if (params.index_q.buckets) add_columns(params.index_q, w, key_buckets, p, chunk);
    if (params.index_t.buckets) add_rows(params.index_t, w, table, 0, p, chunk);
  }

  // Scores of query q from key k on, -inf where a mask closes the pair.
  NATRPB_INLINE Vec<T> open_scores(const Window& w, int64_t q, int64_t k) const {
    const Vec<T> none = splat(-kInfinity<T>);
    Vec<T> s = load(closed + k) == T(0) ? load(p + q * chunk + k) : none;
    if (params.attn_mask && k < w.keys) {
      const uint8_t* mask = params.attn_mask + (w.first_query + q) * w.Nk + w.first_key + k;
      s = load_narrow<T>(mask, w.keys - k) == 0 ? s : none;
    }
    return s;
  }

  // ---- forward ----

  // p: scores -> exp(score - peak), with peak and sum carried on; returns by what former sums must be multiplied.
  T softmax(const Window& w, int64_t q) const {
    T* row_p = p + q * chunk;
    const int64_t i = w.first_query - first + q;
    Vec<T> most = splat(w.first_key ? peak[i] : -kInfinity<T>);
    for (int64_t k = 0; k < chunk; k += L) {
      const Vec<T> s = open_scores(w, q, k);
      store(row_p + k, s);
      most = max<T>(s, most);
    }
    const T top = largest_of<T>(most);
    const T base = top - top == T(0) ? top : T(0);  // infinite scores: inf - inf would lose lse
    Vec<T> total{};
    for (int64_t k = 0; k < chunk; k += L) {
      const Vec<T> e = exp<T>(load(row_p + k) - base);
      store(row_p + k, e);
      total += e;
    }
    const T before = w.first_key ? sum[i] : T(0);
    const T factor = before == T(0) ? T(0) : exp<T>(splat(peak[i] - base))[0];
    sum[i] = before * factor + sum_of<T>(total);
    peak[i] = sum[i] == T(0) ? -kInfinity<T> : base;
    return factor;
  }

  void forward_window(const Window& w) const {
    const int64_t i = w.first_query - first;
    scores(w);
    for (int64_t q = 0; q < w.queries; ++q) {
      const T factor = softmax(w, q);
      if (w.first_key == 0) continue;
      T *out_row = out + (i + q) * vpitch, *binned_row = binned + (i + q) * pitch_v;
      store_row(out_row, vpitch, splat(factor), out_row);
      store_row(binned_row, pitch_v, splat(factor), binned_row);
    }
    multiply<T>(w.queries, vpitch, w.keys, {p, chunk, 1}, value_rows, vpitch, out + i * vpitch, vpitch, w.first_key > 0);
    if (params.index_v.buckets) sum_by_bucket(params.index_v, w, p, chunk, bins_v, binned + i * pitch_v);
  }

  void forward() const {
    clear(binned, count * pitch_v);
    clear(bins_v, 2 * kBinRows * pitch_v);
    stage_table();
    if (params.keys == 0) {
      clear(out, count * vpitch);
      for (int64_t i = 0; i < count; ++i) peak[i] = -kInfinity<T>, sum[i] = T(0);
    }
    for_windows([&](const Window& w) { stage_keys(w, false); }, [&](const Window& w) { forward_window(w); },
                [](const Window&) {});
    for (int64_t i = 0; i < count; ++i) {
      const T factor = sum[i] == T(0) ? T(0) : T(1) / sum[i];
      store_rows(params.out, first + i, 1, value_depth, factor, vpitch, out + i * vpitch);
      if (params.index_v.buckets) {
        store_rows(params.binned, first + i, 1, params.index_v.buckets, factor, pitch_v, binned + i * pitch_v);
      }
      *wide_row(params.lse, first + i) = peak[i] + log<T>(splat(sum[i]))[0];
    }
  }

  // ---- backward ----

  T dot(const RowsView& a, const RowsView& b, int64_t i, int64_t columns) const {
    const S *x = row(a, i), *y = row(b, i);
    Vec<T> total{};
    for (int64_t c = 0; c < columns; c += L)
      total += load_channels<T>(x + c, columns - c) * load_channels<T>(y + c, columns - c);
    return sum_of<T>(total);
  }
  void stage_statistics() const {
    for (int64_t i = 0; i < count; ++i) {
      const T given = *wide_row(params.lse, first + i);
      lse[i] = given == -kInfinity<T> ? T(0) : given;  // no key at all: exp(-inf - 0) = 0
      delta[i] = dot(params.dout, params.out, first + i, value_depth);
      if (params.dbinned.data) delta[i] += dot(params.dbinned, params.binned, first + i, params.index_v.buckets);
      if (params.dlse.data) delta[i] -= *wide_row(params.dlse, first + i);
    }
  }

  // p: scores -> weights;  ds: d weights -> d scores
  void softmax_backward(const Window& w) const {
    for (int64_t q = 0; q < w.queries; ++q) {
      T *row_p = p + q * chunk, *row_ds = ds + q * chunk;
      const int64_t i = w.first_query - first + q;
      for (int64_t k = 0; k < chunk; k += L) {
        const Vec<T> weight = exp<T>(open_scores(w, q, k) - lse[i]);
        store(row_p + k, weight);
        store(row_ds + k, weight * (load(row_ds + k) - delta[i]));
      }
    }
  }

  void backward_window(const Window& w) const {
    const int64_t i = w.first_query - first;
    scores(w);
    stage_rows(params.dout, w.first_query, w.queries, value_depth, T(1), vpitch, dout);
    multiply<T>(w.queries, chunk, value_depth, {dout, vpitch, 1}, value_columns, chunk, ds, chunk, false);
    if (params.dbinned.data) {
      stage_rows(params.dbinned, w.first_query, w.queries, params.index_v.buckets, T(1), pitch_v, dbinned);
      add_rows(params.index_v, w, dbinned, pitch_v, ds, chunk);
    }
    softmax_backward(w);
    multiply<T>(w.queries, pitch, w.keys, {ds, chunk, 1}, key_rows, pitch, dquery + i * pitch, pitch, w.first_key > 0);
    multiply<T>(w.keys, pitch, w.queries, {ds, 1, chunk}, query, pitch, dkey, pitch, true);
    multiply<T>(w.keys, vpitch, w.queries, {p, 1, chunk}, dout, vpitch, dvalue, vpitch, true);
    if (params.index_k.buckets) sum_by_bucket(params.index_k, w, ds, chunk, bins_k, dquery_buckets + i * pitch_k);
    if (params.index_q.buckets) sum_columns_by_bucket(params.index_q, w, ds, chunk, dkey_buckets);
    if (params.index_t.buckets) for_bins(params.index_t, w, ds, chunk, bins_t, [](int64_t, int64_t) {});
  }

  // Sums of one kind of a chunk's keys: results, or the item's part of them in the workspace (to be merged by another).
  void store_keys(const Window& w, const RowsView& m, int64_t columns, int64_t from_pitch, const T* from, T*& part) const {
    if (!part) return store_rows(m, w.first_key, w.keys, columns, T(1), from_pitch, from);
    for (int64_t k = 0; k < w.keys; ++k, part += columns) store_row(from + k * from_pitch, columns, splat(T(1)), part);
  }

  void backward() const {
    clear(bins_k, 2 * kBinRows * pitch_k);
    clear(bins_t, 2 * kBinRows * pitch_t);
    clear(dquery_buckets, count * pitch_k);
    if (params.keys == 0) clear(dquery, count * pitch);
    stage_table();
    stage_statistics();
    T* part = plan.partial() ? static_cast<T*>(params.workspace) + item * plan.partial() : nullptr;
    T* part_dkey = plan.dkey ? part : nullptr;
    T* part_dvalue = plan.dvalue ? part + plan.dkey : nullptr;
    T* part_dkey_rows = plan.dkey_rows ? part + plan.dkey + plan.dvalue : nullptr;
    for_windows(
        [&](const Window& w) {
          stage_keys(w, true);
          clear(dkey, w.keys * pitch);
          clear(dvalue, w.keys * vpitch);
          clear(dkey_buckets, w.keys * pitch_q);
        },
        [&](const Window& w) { backward_window(w); },
        [&](const Window& w) {
          store_keys(w, params.dkey, depth, pitch, dkey, part_dkey);
          store_keys(w, params.dvalue, value_depth, vpitch, dvalue, part_dvalue);
          if (params.index_q.buckets) {
            store_keys(w, params.dkey_rows, params.index_q.buckets, pitch_q, dkey_buckets, part_dkey_rows);
          }
        });
    store_rows(params.dquery, first, count, depth, static_cast<T>(params.scale), pitch, dquery);
    if (params.index_k.buckets) {
      store_rows(params.dquery_rows, first, count, params.index_k.buckets, T(1), pitch_k, dquery_buckets);
    }
    for (int64_t c = 0; c < plan.dtable; ++c) {
      T total{};
      for (int64_t r = 0; r < 2 * kBinRows; ++r) total += bins_t[r * pitch_t + c];
      part[plan.partial() - plan.dtable + c] = total;
    }
  }
};

// to[i] = sum of the parts of rows i, `step` elements apart, in their order
template <class S>
void merge_parts(const RowsView& m, int64_t batch, int64_t head, int64_t rows, int64_t columns, const Compute<S>* part,
                 int64_t step, int64_t parts) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, part += columns) {
    S* to = static_cast<S*>(m.data) + m.offset(batch, head, r);
    for (int64_t c = 0; c < columns; c += L) {
      Vec<T> total = load_channels<T>(part + c, columns - c);
      for (int64_t i = 1; i < parts; ++i) total += load_channels<T>(part + i * step + c, columns - c);
      columns - c >= L ? store_as(to + c, total) : store_part<T>(to + c, total, columns - c);
    }
  }
}
