// Encodings spread over pairs, and pairs summed by bucket. Rows of buckets lie in scratch memory, padded with zeros.
//
//   RowLookup       one row, many indices: the row stays in registers where the machine can permute them
//   add_rows        s[q][k] += row_q[index[q][k]], or one row for all q
//   add_columns     s[q][k] += row_k[index[q][k]]: lanes are queries where rows stay in registers, else gathers
//   sum_by_bucket   bins_q[index[q][k]] += p[q][k]; several rows at once, because additions to one bin must wait for each other

// The first n elements of an array, as lanes; the lanes behind them are zero.
template <class T, class E>
NATRPB_INLINE Index<T> load_narrow(const E* p, int64_t n) {
  typedef E Narrow __attribute__((vector_size(kLanes<T> * sizeof(E))));
  Narrow v{};
  if (n >= kLanes<T>) {
    __builtin_memcpy(&v, p, sizeof v);
  } else {
    __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(E));
  }
  return __builtin_convertvector(v, Index<T>);
}

// result[l] = base[offset[l]]
template <class T>
NATRPB_INLINE Vec<T> gather(const T* base, Index<T> offset) {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, bit_cast<__m512i>(offset), base, 4));
  } else {
    return bit_cast<Vec<T>>(_mm512_mask_i64gather_pd(_mm512_setzero_pd(), 0xff, bit_cast<__m512i>(offset), base, 8));
  }
#elif defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    const __m256 all = bit_cast<__m256>(Index<T>{} - 1);
    return bit_cast<Vec<T>>(_mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, bit_cast<__m256i>(offset), all, 4));
  }
#endif
  Vec<T> result;
  for (int l = 0; l < kLanes<T>; ++l) result[l] = base[offset[l]];
  return result;
}

// Looks up one row of buckets. PAIRS > 0 keeps it in 2 * PAIRS vectors; the row must be padded to them.
template <class T, int PAIRS>
struct RowLookup {
  Vec<T> entry[2 * PAIRS];

  NATRPB_INLINE explicit RowLookup(const T* row) {
    NATRPB_UNROLL for (int i = 0; i < 2 * PAIRS; ++i) entry[i] = load(row + i * kLanes<T>);
  }
  NATRPB_INLINE Vec<T> operator()([[maybe_unused]] Index<T> index) const {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
    static_assert(sizeof(T) == 4);
    const __m512i i = bit_cast<__m512i>(index);  // of which a permutation takes the low bits
    __m512 result = _mm512_permutex2var_ps(bit_cast<__m512>(entry[0]), i, bit_cast<__m512>(entry[1]));
    NATRPB_UNROLL for (int p = 1; p < PAIRS; ++p) {
      const __m512 other = _mm512_permutex2var_ps(bit_cast<__m512>(entry[2 * p]), i, bit_cast<__m512>(entry[2 * p + 1]));
      const __mmask16 here = _mm512_cmpge_epi32_mask(i, _mm512_set1_epi32(p * 2 * kLanes<T>));
      result = _mm512_mask_mov_ps(result, here, other);
    }
    return bit_cast<Vec<T>>(result);
#else
    static_assert(PAIRS < 0, "no permutation of several vectors here");
#endif
  }
};
template <class T>
struct RowLookup<T, 0> {
  const T* row;

  NATRPB_INLINE explicit RowLookup(const T* row_) : row(row_) {}
  NATRPB_INLINE Vec<T> operator()(Index<T> index) const { return gather<T>(row, index); }
};

// Whether rows of this many buckets stay in registers, and in how many pairs of them.
template <class T>
constexpr int lookup_pairs([[maybe_unused]] int64_t buckets) {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  if (sizeof(T) == 4) return buckets <= 32 ? 1 : buckets <= 64 ? 2 : buckets <= 128 ? 4 : 0;
#endif
  return 0;
}
template <class T>
int64_t row_pitch(int64_t buckets) {
  if (buckets == 0) return 0;
  const int64_t pairs = lookup_pairs<T>(buckets);
  return pairs ? pairs * 2 * kLanes<T> : ceil_div(buckets, kLanes<T>) * kLanes<T>;
}
// Calls f(Const<PAIRS>{}).
template <class T, class F>
NATRPB_INLINE void with_lookup([[maybe_unused]] int64_t buckets, F&& f) {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    switch (lookup_pairs<T>(buckets)) {
      case 1:
        return f(Const<1>{});
      case 2:
        return f(Const<2>{});
      case 4:
        return f(Const<4>{});
    }
  }
#endif
  f(Const<0>{});
}

// The pairs of a tile: queries first_query .. and keys first_key ..; maps are [terms, Nq, Nk].
struct Window {
  int64_t first_query, first_key, queries, keys;
  int64_t Nq, Nk;

  // A map's indices of the window's query q, from the window's first key on.
  NATRPB_INLINE const int32_t* index(const BucketMap& map, int64_t term, int64_t q) const {
    return map.data + (term * Nq + first_query + q) * Nk + first_key;
  }
};

// The most queries of a window.
inline constexpr int64_t kMostQueries = 48;

// s[q][k] += rows[q][index[q][k]], summed over terms; rows lie row_step apart (0: one row for all queries).
template <class T>
void add_rows(const BucketMap& map, const Window& window, const T* rows, int64_t row_step, T* s, int64_t s_pitch) {
  with_lookup<T>(map.buckets, [&](auto pairs) NATRPB_LAMBDA {
    for (int64_t q = 0; q < window.queries; ++q) {
      const RowLookup<T, decltype(pairs)::value> lookup(rows + q * row_step);
      for (int64_t term = 0; term < map.terms; ++term) {
        const int32_t* index = window.index(map, term, q);
        T* to = s + q * s_pitch;
        for (int64_t k = 0; k < window.keys; k += kLanes<T>) {
          store(to + k, load(to + k) + lookup(load_narrow<T>(index + k, window.keys - k)));
        }
      }
    }
  });
}

// kLanes keys of add_columns: transposed, so that every key looks up its own row, for all queries.
template <class T, int PAIRS>
void add_column_block(const BucketMap& map, const Window& window, int64_t term, int64_t k, const T* rows, int64_t pitch, T* s,
                      int64_t s_pitch) {
  constexpr int L = kLanes<T>;
  alignas(kVectorBytes) T words[L * kMostQueries];  // [key][query], first indices, then what they look up
  for (int64_t q = 0; q < window.queries; q += L) {
    Vec<T> tile[L];
    NATRPB_UNROLL for (int r = 0; r < L; ++r) {
      const int64_t query = min_of(q + r, window.queries - 1);
      tile[r] = bit_cast<Vec<T>>(load_narrow<T>(window.index(map, term, query) + k, window.keys - k));
    }
    transpose<T>(tile);
    NATRPB_UNROLL for (int r = 0; r < L; ++r) store(words + r * kMostQueries + q, tile[r]);
  }
  for (int l = 0; l < L; ++l) {
    const RowLookup<T, PAIRS> lookup(rows + l * pitch);
    for (int64_t q = 0; q < window.queries; q += L) {
      T* word = words + l * kMostQueries + q;
      store(word, lookup(bit_cast<Index<T>>(load(word))));
    }
  }
  for (int64_t q = 0; q < window.queries; q += L) {
    Vec<T> tile[L];
    NATRPB_UNROLL for (int r = 0; r < L; ++r) tile[r] = load(words + r * kMostQueries + q);
    transpose<T>(tile);
    NATRPB_UNROLL for (int r = 0; r < L; ++r) {
      T* to = s + (q + r) * s_pitch;
      if (q + r < window.queries) store(to, load(to) + tile[r]);
    }
  }
}

// s[q][k] += rows[k][index[q][k]], summed over terms; rows lie row_pitch apart.
template <class T>
void add_columns(const BucketMap& map, const Window& window, const T* rows, T* s, int64_t s_pitch) {
  constexpr int L = kLanes<T>;
  const int64_t pitch = row_pitch<T>(map.buckets);
  with_lookup<T>(map.buckets, [&](auto pairs) NATRPB_LAMBDA {
    constexpr int PAIRS = decltype(pairs)::value;
    for (int64_t term = 0; term < map.terms; ++term) {
      for (int64_t k = 0; k < window.keys; k += L) {
        if constexpr (PAIRS > 0) {
          add_column_block<T, PAIRS>(map, window, term, k, rows + k * pitch, pitch, s + k, s_pitch);
        } else {
          Index<T> start{};
          for (int l = 0; l < L; ++l) start[l] = static_cast<CountOf<T>>(l * pitch);
          for (int64_t q = 0; q < window.queries; ++q) {
            const Index<T> index = load_narrow<T>(window.index(map, term, q) + k, window.keys - k);
            store(s + q * s_pitch + k, load(s + q * s_pitch + k) + gather<T>(rows + k * pitch, start + index));
          }
        }
      }
    }
  });
}
inline constexpr int kBinRows = 4;

// bins[2 r + (k & 1)][index[r][k]] += p[r][k]: two sets of bins a row halve the wait of one addition for the last.
template <class T, int ROWS>
void fill_bins(const T* p, int64_t p_pitch, const int32_t* index, int64_t index_step, int64_t keys, T* bins, int64_t pitch) {
  int64_t k = 0;
  for (; k + 1 < keys; k += 2) {
    NATRPB_UNROLL for (int r = 0; r < ROWS; ++r) {
      bins[2 * r * pitch + index[r * index_step + k]] += p[r * p_pitch + k];
      bins[(2 * r + 1) * pitch + index[r * index_step + k + 1]] += p[r * p_pitch + k + 1];
    }
  }
  if (k == keys) return;
  NATRPB_UNROLL for (int r = 0; r < ROWS; ++r) bins[2 * r * pitch + index[r * index_step + k]] += p[r * p_pitch + k];
}

// Calls done(first query, count) after the bins [2 kBinRows][pitch] hold the sums of up to kBinRows queries.
template <class T, class F>
NATRPB_INLINE void for_bins(const BucketMap& map, const Window& window, const T* p, int64_t p_pitch, T* bins, F&& done) {
  const int64_t pitch = row_pitch<T>(map.buckets);
  for (int64_t q = 0; q < window.queries; q += kBinRows) {
    const int64_t rows = min_of(kBinRows, window.queries - q);
    for (int64_t term = 0; term < map.terms; ++term) {
      const int32_t* index = window.index(map, term, q);
      unroll<kBinRows>([&](auto i) NATRPB_LAMBDA {
        constexpr int n = decltype(i)::value + 1;
        if (rows == n) fill_bins<T, n>(p + q * p_pitch, p_pitch, index, window.Nk, window.keys, bins, pitch);
      });
    }
    done(q, rows);
  }
}

// sums[q][c] += sum of p[q][k] over the k with index[q][k] = c; bins are left at zero, as they must come.
template <class T>
void sum_by_bucket(const BucketMap& map, const Window& window, const T* p, int64_t p_pitch, T* bins, T* sums) {
  const int64_t pitch = row_pitch<T>(map.buckets);
  for_bins(map, window, p, p_pitch, bins, [&](int64_t q, int64_t rows) NATRPB_LAMBDA {
    for (int64_t r = 0; r < rows; ++r) {
      T *even = bins + 2 * r * pitch, *odd = even + pitch, *to = sums + (q + r) * pitch;
      for (int64_t c = 0; c < pitch; c += kLanes<T>) {
        store(to + c, load(to + c) + (load(even + c) + load(odd + c)));
        store(even + c, Vec<T>{});
        store(odd + c, Vec<T>{});
      }
    }
  });
}

// sums[k][c] += sum of p[q][k] over the q with index[q][k] = c, in the order of q.
template <class T>
void sum_columns_by_bucket(const BucketMap& map, const Window& window, const T* p, int64_t p_pitch, T* sums) {
  const int64_t pitch = row_pitch<T>(map.buckets);
  for (int64_t term = 0; term < map.terms; ++term) {
    for (int64_t q = 0; q < window.queries; ++q) {
      const int32_t* index = window.index(map, term, q);
      for (int64_t k = 0; k < window.keys; ++k) sums[k * pitch + index[k]] += p[q * p_pitch + k];
    }
  }
}
