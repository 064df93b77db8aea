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

// to[i][channel] = from[i][channel]
template <class T, class S>
void copy_rows(const S* from, int64_t step, int64_t count, int64_t channels, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < count; ++i, from += step) {
    for (int64_t c = 0; c < channels; c += L, to += L) store(to, load_channels<T>(from + c, channels - c));
  }
}

// to[c][i] = factor * from[i][c] for whole vectors of i; lanes from count on repeat the last row.
template <class T, class S>
void copy_columns(const S* from, int64_t step, int64_t count, int64_t channels, T factor, int64_t pitch, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t last = min_of(L, count - i) - 1;
    for (int64_t c = 0; c < channels; c += L) {
      const S* corner = from + i * step + c;
      T* target = to + c * pitch + i;
      const int64_t left = channels - c;
      Vec<T> tile[L];
      unroll<L>([&](auto r) NATRPB_LAMBDA {
        constexpr int n = decltype(r)::value;
        tile[n] = load_channels<T>(corner + min_of(n, last) * step, left) * factor;
      });
      transpose<T>(tile);
      unroll<L>([&](auto r) NATRPB_LAMBDA {
        constexpr int n = decltype(r)::value;
        if (n < left) store(target + n * pitch, tile[n]);
      });
    }
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
