// Asking for memory before it is needed. Hardware does not foresee columns that lie a few heads apart.

// Address of a row's first element in storage; p are in-group positions of the item.
template <class S>
NATRPB_INLINE S* row_address(const LocalAttentionParams& params, const Item& item, const View& view, int64_t p0, int64_t p1,
                             int64_t p2) {
  const auto position = [&](int axis, int64_t p) { return params.axis[axis].position(item.group[axis], p); };
  const int64_t at[kAxes] = {position(0, p0), position(1, p1), position(2, p2)};
  return static_cast<S*>(view.data) + view.offset(item.batch, item.head, at);
}

// Elements from an in-group position to the next one along an axis.
NATRPB_INLINE int64_t step_of(const LocalAttentionParams& params, const View& view, int axis) {
  return view.space[axis] * params.axis[axis].dilation;
}

// Asks for `count` columns `step` elements apart; those that do not begin with a cache line may end in one more. NB: into the second-level
// cache, where twice as many a second arrive as in the first (on Zen 4, docs/design/cpu.md); inlined by force, GCC drops calls that do nothing
// but prefetch.
template <class S>
NATRPB_INLINE void prefetch_columns(const S* row, int64_t step, int64_t count, int64_t channels) {
  constexpr int64_t kLine = 64 / sizeof(S);
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 64 == 0 && step % kLine == 0;
  const int64_t lines = ceil_div(channels, kLine) + (aligned ? 0 : 1);
  for (int64_t i = 0; i < lines; ++i) {
    const S* at = row + min_of(i * kLine, channels - 1);
    for (int64_t column = 0; column < count; ++column, at += step) __builtin_prefetch(at, 0, 2);
  }
}

// Whether the tensors that a call touches do not stay in a core's own caches: query, key, value and out; or query, key, value, dout and
// the three gradients.
inline bool leaves_caches(const LocalAttentionParams& params, bool backward, size_t element_bytes) {
  constexpr int64_t kCached = int64_t{1} << 20;
  int64_t positions = params.batch * params.heads;
  for (const Axis& axis : params.axis) positions *= axis.length;
  const int64_t channels = backward ? 4 * params.head_dim + 3 * params.value_dim : 2 * (params.head_dim + params.value_dim);
  return positions * channels * static_cast<int64_t>(element_bytes) > kCached;
}

// What a group of query rows asks for beside its work, where a call's tensors do not stay in a core's caches: the rows of its own
// results, and the part of the upcoming item's keys and values that lies in that item's box where the group lies in this one's.
// NB: one row at a time, between tiles. All at once, the requests would wait for one another, and the work for them.
template <class S>
class Stream {
 public:
  Stream(const LocalAttentionParams& params, const Plan& plan, bool backward)
      : params_(params), plan_(plan), in_phases_(backward), wanted_(leaves_caches(params, backward, sizeof(S))) {}

  void begin(const Item& item, const View& result, int64_t channels) {
    if (!wanted_) return;
    item_ = item;
    result_ = result;
    channels_ = channels;
    upcoming_.empty = true;
    for (int64_t i = item.index + 1; i < plan_.items && upcoming_.empty; ++i) {
      upcoming_ = locate(params_, plan_, i);
      if (in_phases_ && upcoming_.color != item.color) upcoming_.empty = true;
    }
  }

  // Plans for `rows` query rows of one block from (p0, p1) on.
  template <class T>
  void plan(const Block<T>& block, int64_t p0, int64_t p1, int64_t rows) {
    if (!wanted_) return;
    next_ = end_ = 0;
    for (int64_t r = 0; r < rows; ++r) add(item_, result_, p0, p1 + r, block.column, block.width, channels_);
    if (upcoming_.empty) return;
    const int64_t q0 = p0 + upcoming_.lo[0] - item_.lo[0], q1 = p1 + upcoming_.lo[1] - item_.lo[1],
                  q2 = block.column + upcoming_.lo[2] - item_.lo[2];
    const int64_t width = min_of(block.width, upcoming_.hi[2] - q2);
    if (q0 >= upcoming_.hi[0]) return;
    for (int64_t r = 0; r < min_of(rows, upcoming_.hi[1] - q1); ++r) {
      add(upcoming_, params_.key, q0, q1 + r, q2, width, params_.head_dim);
      add(upcoming_, params_.value, q0, q1 + r, q2, width, params_.value_dim);
    }
  }

  // Asks for the next row of the plan.
  NATRPB_INLINE void next() {
    if (next_ < end_) ask();
  }

 private:
  struct Run {
    const S* row;
    int64_t step, count, channels;
  };

  // NB: not inlined, lest the tiles around it lose registers to it.
  [[gnu::noinline]] void ask() {
    const Run& run = runs_[next_++];
    prefetch_columns(run.row, run.step, run.count, run.channels);
  }

  void add(const Item& item, const View& view, int64_t p0, int64_t p1, int64_t p2, int64_t count, int64_t channels) {
    runs_[end_++] = {row_address<S>(params_, item, view, p0, p1, p2), step_of(params_, view, 2), count, channels};
  }

  const LocalAttentionParams& params_;
  const Plan& plan_;
  const bool in_phases_;  // items of one color after the other
  const bool wanted_;
  Item item_, upcoming_;
  View result_;
  int64_t channels_;
  Run runs_[3 * 2 * kRowTile];  // result, key, value; blocks fold up to two rows
  int next_ = 0, end_ = 0;
};

// The positions of one window, in-group; clipped where the map ends.
struct Window {
  int64_t first[kAxes];
  int64_t count[kAxes];

  int64_t positions() const { return count[0] * count[1] * count[2]; }
  bool has_shape_of(const Window& other) const {
    return count[0] == other.count[0] && count[1] == other.count[1] && count[2] == other.count[2];
  }
};

// Rows of a tensor: what a window reads, or writes.
struct Tensor {
  const View* view;
  int64_t channels;
};

// What a window's work asks for meanwhile: rows that are needed soon, a few of them between two tiles, as Stream does for blocks.
template <class S>
class Ahead {
 public:
  Ahead(const LocalAttentionParams& params, bool backward)
      : params_(params), wanted_(leaves_caches(params, backward, sizeof(S))) {}

  // What is added now is asked for in as many calls of next(), spread evenly.
  void begin(int64_t calls) {
    calls_ = calls;
    part_ = parts_;
    end_ = parts_;
    plane_ = row_ = column_ = groups_ = due_ = 0;
  }
  void add(const Item& item, const Window& window, const Tensor& tensor) {
    if (!wanted_ || window.positions() == 0) return;
    Part& part = *end_++;
    part.row = row_address<S>(params_, item, *tensor.view, window.first[0], window.first[1], window.first[2]);
    for (int axis = 0; axis < kAxes; ++axis) {
      part.step[axis] = step_of(params_, *tensor.view, axis);
      part.count[axis] = window.count[axis];
    }
    part.channels = tensor.channels;
    groups_ += window.count[0] * window.count[1] * ceil_div(window.count[2], kTogether);
  }
  NATRPB_INLINE void next() {
    if (part_ < end_) ask();
  }

 private:
  struct Part {
    const S* row;
    int64_t step[kAxes], count[kAxes], channels;
  };
  static constexpr int64_t kTogether = 8;  // neighboring positions

  // NB: not inlined, lest the tiles around it lose registers to it.
  [[gnu::noinline]] void ask() {
    for (due_ += groups_; due_ >= calls_ && part_ < end_; due_ -= calls_) {
      const Part& part = *part_;
      prefetch_columns(part.row + plane_ * part.step[0] + row_ * part.step[1] + column_ * part.step[2], part.step[2],
                       min_of(kTogether, part.count[2] - column_), part.channels);
      if ((column_ += kTogether) < part.count[2]) continue;
      column_ = 0;
      if (++row_ < part.count[1]) continue;
      row_ = 0;
      if (++plane_ < part.count[0]) continue;
      plane_ = 0;
      ++part_;
    }
  }

  const LocalAttentionParams& params_;
  const bool wanted_;
  Part parts_[8];
  Part *part_ = parts_, *end_ = parts_;
  int64_t calls_ = 1, groups_ = 0, due_ = 0;
  int64_t plane_ = 0, row_ = 0, column_ = 0;
};
