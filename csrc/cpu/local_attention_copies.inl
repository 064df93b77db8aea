// Copies between the caller's tensors (storage type S) and scratch memory (compute type T, padded to whole vectors).

template <class T>
void clear(T* p, int64_t count) {
  __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(T));
}

// The first kLanes of `left` channels; zero behind the last.
template <class T, class S>
NATRPB_INLINE Vec<T> load_channels(const S* p, int64_t left) {
  return left >= kLanes<T> ? load_as<T>(p) : load_part<T>(p, left);
}

// Where rows of channels lie: `step` elements apart, from row `width` on `jump` elements further.
struct Steps {
  int64_t step;
  int64_t width;
  int64_t jump;

  Steps(int64_t step_ = 0, int64_t width_ = INT64_MAX, int64_t jump_ = 0) : step(step_), width(width_), jump(jump_) {}
  NATRPB_INLINE int64_t operator()(int64_t i) const { return i * step + (i >= width ? jump : 0); }
};

// to[i][channel] = from[i][channel]
template <class T, class S>
void copy_rows(const S* from, Steps steps, int64_t count, int64_t channels, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < count; ++i) {
    const S* row = from + steps(i);
    for (int64_t c = 0; c < channels; c += L, to += L) store(to, load_channels<T>(row + c, channels - c));
  }
}

// to[c][lead + i] = factor * from[i][c] for whole vectors of lead + i; lanes before the first row and behind the last repeat it.
template <class T, class S>
void copy_columns(const S* from, Steps steps, int64_t count, int64_t channels, T factor, int64_t pitch, T* to,
                  int64_t lead = 0) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < lead + count; i += L) {
    const S* row[L];
    for (int n = 0; n < L; ++n) row[n] = from + min_of(max_of(i + n - lead, 0), count - 1) * steps.step;
    if (count > steps.width) {
      for (int n = 0; n < L; ++n) row[n] += i + n - lead >= steps.width ? steps.jump : 0;
    }
    const auto corner = [&](int64_t c, int64_t left, auto whole) NATRPB_LAMBDA {
      constexpr bool kWhole = decltype(whole)::value;
      Vec<T> tile[L];
      unroll<L>([&](auto r) NATRPB_LAMBDA {
        const S* p = row[decltype(r)::value] + c;
        tile[decltype(r)::value] = (kWhole ? load_as<T>(p) : load_part<T>(p, left)) * factor;
      });
      transpose<T>(tile);
      unroll<L>([&](auto r) NATRPB_LAMBDA {
        constexpr int n = decltype(r)::value;
        if (kWhole || n < left) store(to + (c + n) * pitch + i, tile[n]);
      });
    };
    int64_t c = 0;
    for (; c + L <= channels; c += L) corner(c, L, Const<true>{});
    if (c < channels) corner(c, channels - c, Const<false>{});
  }
}

// to[channel] = factor * from[channel]
template <class T, class S>
void store_row(const T* from, int64_t channels, Vec<T> factor, S* to) {
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) store_as(to + c, load(from + c) * factor);
  if (c < channels) store_part<T>(to + c, load(from + c) * factor, channels - c);
}
// to[channel] += factor * from[channel]
template <class T, class S>
void add_row(const T* from, int64_t channels, Vec<T> factor, S* to) {
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const Vec<T> sum = load_channels<T>(to + c, channels - c) + load(from + c) * factor;
    if (channels - c >= L) {
      store_as(to + c, sum);
    } else {
      store_part<T>(to + c, sum, channels - c);
    }
  }
}
