// The unfused ops, between tensors of attention weights and a Worker's blocks.

// attn[query][slot] <-> score[slot][lane]
template <class W>
void store_attn(W& worker, int64_t p0, int64_t p1, const Block<typename W::T>& block, const typename W::T* score) {
  const View& attn = worker.params.attn;
  copy_slots(score, worker.slots, worker.row_start(attn, p0, p1, block.column), worker.lane_steps(attn, block), block.live);
}
template <class W>
void load_attn(W& worker, int64_t p0, int64_t p1, const Block<typename W::T>& block, typename W::T* score) {
  const View& attn = worker.params.attn;
  copy_columns<typename W::Storage>(worker.row_start(attn, p0, p1, block.column), worker.lane_steps(attn, block), block.live,
                                    worker.slots, W::L, score);
}

template <class W>
void qk(W& worker) {
  using T = typename W::T;
  worker.for_blocks([&](const Block<T>& block, int64_t p0, int64_t p1, int count, const KeyRows* rows) {
    worker.query_products(block, p0, p1, count, rows);
    for (int r = 0; r < count; ++r) {
      T* p = worker.score + r * worker.slots * W::L;
      fill_missing(block, rows[r], worker.kernel, static_cast<T>(worker.params.fill), p);
      store_attn(worker, p0, block.row(p1, r), block, p);
    }
  });
}

// av, av_transposed and bias_grad: `use` consumes the weights of one row of queries.
template <class W, class Use, class... End>
void for_attn(W& worker, Use&& use, End&&... column_end) {
  worker.for_blocks(
      [&](const Block<typename W::T>& block, int64_t p0, int64_t p1, int count, const KeyRows* rows) {
        for (int r = 0; r < count; ++r) {
          load_attn(worker, p0, block.row(p1, r), block, worker.score);
          use(block, p0, block.row(p1, r), rows[r]);
        }
      },
      column_end...);
}
template <class W>
void av(W& worker) {
  using T = typename W::T;
  for_attn(worker, [&](const Block<T>& block, int64_t p0, int64_t p1, const KeyRows& rows) {
    worker.store_sums(worker.params.out, p0, p1, block, rows, worker.score, worker.value_rows, worker.value_depth, splat(T(1)));
  });
}
template <class W>
void av_transposed(W& worker) {
  using T = typename W::T;
  for_attn(worker, [&](const Block<T>& block, int64_t p0, int64_t p1, const KeyRows& rows) {
    worker.scatter_rows(worker.params.dout, p0, p1, 1, block, &rows, worker.value_depth, T(1), worker.dout_tile, worker.score,
                        worker.dvalue_rows);
  });
  worker.store_keys();
}
template <class W>
void bias_grad(W& worker) {
  using T = typename W::T;
  T* table = worker.bias_part();
  for_attn(
      worker,
      [&](const Block<T>&, int64_t p0, int64_t p1, const KeyRows& rows) { worker.add_bias_grad(p0, p1, rows, worker.score); },
      [&](const Block<T>& block) { worker.flush_bias(block, table); });
}
