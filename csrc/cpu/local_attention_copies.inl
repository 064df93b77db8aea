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

// The first kLanes of `left` channels; nothing behind the last is touched.
template <class T, class S>
NATRPB_INLINE void store_channels(S* p, Vec<T> v, int64_t left) {
  left >= kLanes<T> ? store_as(p, v) : store_part<T>(p, v, left);
}

// Where rows of channels lie: `step` elements apart, from row `width` on `jump` elements further.
struct Steps {
  int64_t step;
  int64_t width;
  int64_t jump;

  Steps(int64_t step_ = 0, int64_t width_ = INT64_MAX, int64_t jump_ = 0) : step(step_), width(width_), jump(jump_) {}
  NATRPB_INLINE int64_t operator()(int64_t i) const { return i * step + (i >= width ? jump : 0); }
};

// One number per row of the first `live` lanes; the other lanes are zero.
template <class T>
NATRPB_INLINE Vec<T> load_numbers(const T* from, Steps steps, int live) {
  T numbers[kLanes<T>] = {};
  for (int l = 0; l < live; ++l) numbers[l] = from[steps(l)];
  return load(numbers);
}
template <class T>
NATRPB_INLINE void store_numbers(T* to, Steps steps, int live, Vec<T> v) {
  T numbers[kLanes<T>];
  store(numbers, v);
  for (int l = 0; l < live; ++l) to[steps(l)] = numbers[l];
}

// to[i][channel] = from[i][channel]
template <class T, class S>
void copy_rows(const S* from, Steps steps, int64_t count, int64_t channels, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < count; ++i) {
    const S* row = from + steps(i);
    for (int64_t c = 0; c < channels; c += L, to += L) store(to, load_channels<T>(row + c, channels - c));
  }
}

// to[c][lead + i] = from[i][c] for whole vectors of lead + i, from[i] being `words` neighboring W; lanes before the first row and
// behind the last repeat it.
template <class W, class T, class S>
void copy_columns(const S* from, Steps steps, int64_t count, int64_t words, int64_t pitch, T* to, int64_t lead = 0) {
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
      NATRPB_UNROLL for (int n = 0; n < L; ++n) {
        const W* p = reinterpret_cast<const W*>(row[n]) + c;
        tile[n] = kWhole ? load_as<T>(p) : load_part<T>(p, left);
      }
      transpose<T>(tile);
      NATRPB_UNROLL for (int n = 0; n < L; ++n) {
        if (kWhole || n < left) store(to + (c + n) * pitch + i, tile[n]);
      }
    };
    int64_t c = 0;
    for (; c + L <= words; c += L) corner(c, L, Const<true>{});
    if (c < words) corner(c, words - c, Const<false>{});
  }
}

#ifdef NATRPB_BF16_PRODUCTS
// to[i / 2][channel] = the pair (from[i][channel], from[i + 1][channel]), zero behind the last. Whether all numbers are finite, if
// CHECKED.
template <bool CHECKED = true>
bool copy_row_pairs(const BFloat16* from, int64_t step, int64_t count, int64_t channels, float* to) {
  constexpr int L = kLanes<float>;
  constexpr uint32_t kSigns = 0x80008000, kExponentUnits = 0x00800080;
  Bits<float> found{};
  for (int64_t i = 0; i < count; i += 2, from += 2 * step) {
    for (int64_t c = 0; c < channels; c += L, to += L) {
      const auto row = [&](const BFloat16* p)
                           NATRPB_LAMBDA { return bit_cast<Bits<float>>(load_channels<float>(p + c, channels - c)); };
      const Bits<float> pair = row(from) >> 16 | (i + 1 < count ? row(from + step) : Bits<float>{});
      if constexpr (CHECKED) {
        found |= (pair & ~kSigns) + kExponentUnits;  // overflows into a sign where all bits of an exponent are set
      }
      store(to, bit_cast<Vec<float>>(pair));
    }
  }
  found &= kSigns;
  uint32_t any = 0;
  for (int l = 0; l < L; ++l) any |= found[l];
  return any == 0;
}
// The same of rows of pairs [row][pitch].
NATRPB_INLINE void pair_rows(const float* rows, int64_t pitch, int64_t count, int64_t channels, float* to) {
  copy_row_pairs<false>(reinterpret_cast<const BFloat16*>(rows), 2 * pitch, count, channels, to);
}
#endif

// to[channel] = factor * from[channel]
template <class T, class S>
void store_row(const T* from, int64_t channels, Vec<T> factor, S* to) {
  int64_t c = 0;
  for (; c + kLanes<T> <= channels; c += kLanes<T>) store_as(to + c, load(from + c) * factor);
  if (c < channels) store_part<T>(to + c, load(from + c) * factor, channels - c);
}
// to[channel] += factor * from[channel]
template <class T, class S>
void add_row(const T* from, int64_t channels, Vec<T> factor, S* to) {
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const Vec<T> sum = load_channels<T>(to + c, channels - c) + load(from + c) * factor;
    store_channels<T>(to + c, sum, channels - c);
  }
}
