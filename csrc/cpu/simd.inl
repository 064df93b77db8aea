// Vectors of float and double, written once on the compilers' vector extension and compiled for several instruction sets.
// The including file has chosen NATRPB_ISA and kVectorBytes, and the target by pragma; include every header before that.

template <class T>
struct VectorType;
template <>
struct VectorType<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t index __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorType<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t index __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorType<T>::type;
template <class T>
using Index = typename VectorType<T>::index;
template <class T>
using CountOf = decltype(Index<T>{}[0] + 0);  // an element of Index
template <class T>
using Bits = typename VectorType<T>::bits;
template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);

template <auto I>
struct Const {
  static constexpr auto value = I;
};

template <class F, int... I>
NATRPB_INLINE void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(Const<I>{}), ...);
}
// Calls f(Const<0>{}) ... f(Const<N - 1>{}), for what must be a constant. Otherwise NATRPB_UNROLL is enough to keep arrays in registers,
// and spares the compiler thousands of functions.
template <int N, class F>
NATRPB_INLINE void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

template <class T>
NATRPB_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
NATRPB_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
NATRPB_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // GCC broadcasts a scalar operand; x - 0 keeps the sign of zero
}
// 0, 1, 2, ...
template <class T>
NATRPB_INLINE Index<T> lane_numbers() {
  Index<T> numbers{};
  for (int l = 0; l < kLanes<T>; ++l) numbers[l] = l;
  return numbers;
}
// v, loaded once: GCC would repeat the load of a value with several uses in each of the instructions that can read memory, and a
// load that crosses a cache line costs two.
template <class V>
NATRPB_INLINE V in_register(V v) {
#ifdef NATRPB_X86
  __asm__("" : "+v"(v));
#endif
  return v;
}
template <class V, class U>
NATRPB_INLINE V bit_cast(U u) {
  static_assert(sizeof(V) == sizeof(U));
  V v;
  __builtin_memcpy(&v, &u, sizeof v);
  return v;
}
// a > b ? a : b and a < b ? a : b, NaN where b is NaN; compilers make two instructions of that, the processor has one.
template <class T>
NATRPB_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
  } else {
    return bit_cast<Vec<T>>(_mm512_maskz_max_pd(0xff, bit_cast<__m512d>(a), bit_cast<__m512d>(b)));
  }
#elif defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return bit_cast<Vec<T>>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
  return a > b ? a : b;
#else
  return a > b ? a : b;
#endif
}
template <class T>
NATRPB_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
  } else {
    return bit_cast<Vec<T>>(_mm512_maskz_min_pd(0xff, bit_cast<__m512d>(a), bit_cast<__m512d>(b)));
  }
#elif defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return bit_cast<Vec<T>>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
  return a < b ? a : b;
#else
  return a < b ? a : b;
#endif
}

// result[l] = v[index[l]]. The intrinsics with an explicit full mask are the ones that GCC 12 does not warn about.
template <class T>
NATRPB_INLINE Vec<T> permute(Vec<T> v, Index<T> index) {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_maskz_permutexvar_ps(0xffff, bit_cast<__m512i>(index), bit_cast<__m512>(v)));
  } else {
    return bit_cast<Vec<T>>(_mm512_maskz_permutexvar_pd(0xff, bit_cast<__m512i>(index), bit_cast<__m512d>(v)));
  }
#elif defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm256_permutevar8x32_ps(bit_cast<__m256>(v), bit_cast<__m256i>(index)));
  }
#endif
  Vec<T> result;
  for (int l = 0; l < kLanes<T>; ++l) result[l] = v[index[l]];
  return result;
}

// Lanes J .. J + kLanes - 1, or place[l], of a and b behind one another, where one instruction takes them.
template <int J, class T>
Vec<T> shift_in(Vec<T> a, Vec<T> b);
template <class T>
Vec<T> pick(Vec<T> a, Index<T> place, Vec<T> b);
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
inline constexpr bool kTakesFromTwo = true;

template <int J, class T>
NATRPB_INLINE Vec<T> shift_in(Vec<T> a, [[maybe_unused]] Vec<T> b) {
  if constexpr (J == 0) {
    return a;
  } else if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_maskz_alignr_epi32(0xffff, bit_cast<__m512i>(b), bit_cast<__m512i>(a), J));
  } else {
    return bit_cast<Vec<T>>(_mm512_maskz_alignr_epi64(0xff, bit_cast<__m512i>(b), bit_cast<__m512i>(a), J));
  }
}
template <class T>
NATRPB_INLINE Vec<T> pick(Vec<T> a, Index<T> place, Vec<T> b) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_permutex2var_ps(bit_cast<__m512>(a), bit_cast<__m512i>(place), bit_cast<__m512>(b)));
  } else {
    return bit_cast<Vec<T>>(_mm512_permutex2var_pd(bit_cast<__m512d>(a), bit_cast<__m512i>(place), bit_cast<__m512d>(b)));
  }
}
#else
inline constexpr bool kTakesFromTwo = false;
#endif

template <class T>
inline constexpr T kInfinity = static_cast<T>(__builtin_inf());

// (2^r - 1) / r for r in [0, 1], the highest power first: minimax, 2^r errs by 8e-8 and 3e-18 of its value.
template <class T>
struct PowerOfTwo;
template <>
struct PowerOfTwo<float> {
  static constexpr float kTerms[] = {1.86713021e-3f, 9.01702996e-3f, 5.57999134e-2f, 2.40164450e-1f, 6.93151312e-1f};
};
template <>
struct PowerOfTwo<double> {
  static constexpr double kTerms[] = {6.26346614229602101e-10, 6.55952932277052837e-9, 1.02532124357219342e-7,
                                      1.32083672889511404e-6,  1.52531750555627960e-5, 1.54035123096286604e-4,
                                      1.33335586295667552e-3,  9.61812909955079557e-3, 5.55041086656022533e-2,
                                      2.40226506959063302e-1,  6.93147180559945928e-1};
};
template <class T>
NATRPB_INLINE Vec<T> power_of_two(Vec<T> r) {
  Vec<T> y{};
  for (const T term : PowerOfTwo<T>::kTerms) y = y * r + term;
  return y * r + T(1);
}

// exp(x): exact zero below the smallest normal number, infinity from the largest one on, NaN stays NaN. exp(x) = 2^n 2^r, where n is
// whole and 0 <= r <= 1. Rounding x / ln 2 costs at most |x| units in the last place, the rest errs by less than two.
template <class T>
NATRPB_INLINE Vec<T> exp(Vec<T> x) {
  constexpr int kBias = sizeof(T) == 4 ? 127 : 1023;
  constexpr T kLowest = 1 - kBias;
  x *= T(1.44269504088896340736);
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  if constexpr (sizeof(T) == 4) {
    const __m512 given = bit_cast<__m512>(x);
    const __mmask16 normal = _mm512_cmp_ps_mask(given, _mm512_set1_ps(kLowest), _CMP_NLT_UQ);
    const Vec<T> r = bit_cast<Vec<T>>(_mm512_maskz_reduce_ps(0xffff, given, kFloor));
    return bit_cast<Vec<T>>(
        _mm512_maskz_scalef_ps(normal, bit_cast<__m512>(power_of_two<T>(r)), given));  // rounds n down itself
  } else {
    const __m512d given = bit_cast<__m512d>(x);
    const __mmask8 normal = _mm512_cmp_pd_mask(given, _mm512_set1_pd(kLowest), _CMP_NLT_UQ);
    const Vec<T> r = bit_cast<Vec<T>>(_mm512_maskz_reduce_pd(0xff, given, kFloor));
    return bit_cast<Vec<T>>(_mm512_maskz_scalef_pd(normal, bit_cast<__m512d>(power_of_two<T>(r)), given));
  }
#else
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr T kRound =
      T(int64_t{3} << (kMantissa - 1));  // 1.5 * 2^mantissa: adding it leaves the nearest integer in the low bits
  x = min<T>(splat(T(kBias + 1)), x);
  const Vec<T> shifted = (x - T(0.5)) + kRound;
  const Vec<T> scale = bit_cast<Vec<T>>((bit_cast<Bits<T>>(shifted) + kBias) << kMantissa);
  return x < kLowest ? Vec<T>{} : power_of_two<T>(x - (shifted - kRound)) * scale;
#endif
}

// log(x) for x = 0, normal x > 0 and infinity; NaN stays NaN. x = 2^n m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)).
template <class T>
NATRPB_INLINE Vec<T> log(Vec<T> x) {
  constexpr bool kSingle = sizeof(T) == 4;
  constexpr int kMantissa = kSingle ? 23 : 52;
  using Word = Bits<T>;
  const Word half = bit_cast<Word>(splat(T(0.70710678118654752440)));
  const Index<T> exponent = bit_cast<Index<T>>(bit_cast<Word>(x) - half) >> kMantissa;
  const Vec<T> m = bit_cast<Vec<T>>(bit_cast<Word>(x) - (bit_cast<Word>(exponent) << kMantissa));
  const Vec<T> s = (m - T(1)) / (m + T(1));
  const Vec<T> z = s * s;
  constexpr int kTerms = kSingle ? 5 : 11;  // |s| <= 0.172, z^kTerms / (2 kTerms + 1) is below half a unit
  Vec<T> series = splat(T(1) / (2 * kTerms - 1));
  for (int k = kTerms - 2; k >= 0; --k) series = series * z + T(1) / (2 * k + 1);
  const Vec<T> result = T(2) * s * series + __builtin_convertvector(exponent, Vec<T>) * T(0.69314718055994530942);
  const Vec<T> zero = x == T(0) ? splat(-kInfinity<T>) : result;
  return x < kInfinity<T> ? zero : x;
}

// ---- storage types ----------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));  // one 16-bit word per float lane

template <class S>
struct ComputeType {
  typedef float type;
};
template <>
struct ComputeType<double> {
  typedef double type;
};
template <class S>
using Compute = typename ComputeType<S>::type;

NATRPB_INLINE HalfWords load_words(const void* p) {
  HalfWords words;
  __builtin_memcpy(&words, p, sizeof words);
  return words;
}

template <class T>
NATRPB_INLINE Vec<T> load_as(const T* p) {
  return load(p);
}
template <class T>
NATRPB_INLINE Vec<float> load_as(const BFloat16* p) {
  return bit_cast<Vec<float>>(__builtin_convertvector(load_words(p), Bits<float>) << 16);
}
template <class T>
NATRPB_INLINE Vec<float> load_as(const Float16* p) {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(load_words(p))));
#elif defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(load_words(p))));
#else
  const Bits<float> word = __builtin_convertvector(load_words(p), Bits<float>);
  const Bits<float> magnitude = (word & 0x7fffu) << 13;
  const Bits<float> finite = bit_cast<Bits<float>>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  const Bits<float> value = magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : finite;
  return bit_cast<Vec<float>>(value | (word & 0x8000u) << 16);
#endif
}

template <class T>
NATRPB_INLINE void store_as(T* p, Vec<T> v) {
  store(p, v);
}
NATRPB_INLINE void store_as(BFloat16* p, Vec<float> v) {
#ifdef NATRPB_BF16_PRODUCTS
  const HalfWords words = bit_cast<HalfWords>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#else
  const Bits<float> word = bit_cast<Bits<float>>(v);
  const Bits<float> rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const Bits<float> result = v == v ? rounded : ((word >> 16) | 0x40u);
  const HalfWords words = __builtin_convertvector(result, HalfWords);
#endif
  __builtin_memcpy(p, &words, sizeof words);
}
NATRPB_INLINE void store_as(Float16* p, Vec<float> v) {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  const HalfWords words = bit_cast<HalfWords>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 32
  const HalfWords words = bit_cast<HalfWords>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits<float> word = bit_cast<Bits<float>>(v);
  const Bits<float> magnitude = word & 0x7fffffffu;
  const Bits<float> normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const Bits<float> subnormal = bit_cast<Bits<float>>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  Bits<float> result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? (Bits<float>{} + 0x7c00u) : result;
  result = v == v ? result : (Bits<float>{} + 0x7e00u);
  const HalfWords words = __builtin_convertvector(result | ((word >> 16) & 0x8000u), HalfWords);
#endif
  __builtin_memcpy(p, &words, sizeof words);
}

// The first n < kLanes elements; the other lanes are zero, and nothing behind them is touched.
template <class T, class S>
NATRPB_INLINE Vec<T> load_part(const S* p, int64_t n) {
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(S) == 8) {
    return bit_cast<Vec<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  } else if constexpr (sizeof(S) == 4) {
    return bit_cast<Vec<T>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  } else {
    const HalfWords words = bit_cast<HalfWords>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
    return load_as<T>(reinterpret_cast<const S*>(&words));
  }
#else
  alignas(kVectorBytes) S part[kLanes<T>] = {};
  __builtin_memcpy(part, p, static_cast<size_t>(n) * sizeof(S));
  return load_as<T>(part);
#endif
}
template <class T, class S>
NATRPB_INLINE void store_part(S* p, Vec<T> v, int64_t n) {
  alignas(kVectorBytes) S part[kLanes<T>];
  store_as(part, v);
#if defined(NATRPB_X86) && NATRPB_VECTOR_BYTES == 64
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(S) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), _mm512_load_pd(part));
  } else if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), _mm512_load_ps(part));
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), _mm256_load_si256(reinterpret_cast<const __m256i*>(part)));
  }
#else
  __builtin_memcpy(p, part, static_cast<size_t>(n) * sizeof(S));
#endif
}

// Numbers in a lane of a vector of factors.
template <class F>
inline constexpr int kNumbers = 1;

#ifdef NATRPB_BF16_PRODUCTS
// ---- pairs of bf16 ----------------------------------------------------------------------------------------------------

// Two neighbors in the place of one float: as a lane of Vec<float> only copied, and multiplied by multiply_add.
struct Pair {
  BFloat16 low, high;
};
template <>
inline constexpr int kNumbers<Pair> = 2;

template <class T>
NATRPB_INLINE Vec<float> load_as(const Pair* p) {
  return load(reinterpret_cast<const float*>(p));
}

// low[l] and high[l], rounded, in lane l.
NATRPB_INLINE Vec<float> pair_up(Vec<float> low, Vec<float> high) {
  alignas(kVectorBytes) static constexpr uint16_t kInTurn[2 * kLanes<float>] = {
      0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
  return bit_cast<Vec<float>>(_mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), halves));
}
// The neighbors low[0] and low[1], low[2] and low[3], ..., high[0] and high[1], ..., rounded, in one lane each.
NATRPB_INLINE Vec<float> pair_neighbors(Vec<float> low, Vec<float> high) {
  return bit_cast<Vec<float>>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
}
#endif

// sum + a b: of numbers, or of each lane's pairs, whose exact products are added in fp32.
template <class F>
NATRPB_INLINE Vec<Compute<F>> multiply_add(Vec<Compute<F>> sum, Vec<Compute<F>> a, Vec<Compute<F>> b) {
#ifdef NATRPB_BF16_PRODUCTS
  if constexpr (std::is_same_v<F, Pair>) {
    return bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  } else {
    return sum + a * b;
  }
#else
  return sum + a * b;
#endif
}

// ---- sums and maxima over the lanes of a vector -----------------------------------------------------------------------

template <int S, class V, int... J>
NATRPB_INLINE V rotate(V v, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(v, v, (J ^ S)...);
}
template <class T, int S = kLanes<T> / 2>
NATRPB_INLINE T sum_of(Vec<T> v) {
  if constexpr (S == 0) {
    return v[0];
  } else {
    return sum_of<T, S / 2>(v + rotate<S>(v, std::make_integer_sequence<int, kLanes<T>>{}));
  }
}
template <class T, int S = kLanes<T> / 2>
NATRPB_INLINE T largest_of(Vec<T> v) {
  if constexpr (S == 0) {
    return v[0];
  } else {
    return largest_of<T, S / 2>(max<T>(v, rotate<S>(v, std::make_integer_sequence<int, kLanes<T>>{})));
  }
}

// ---- transposition ----------------------------------------------------------------------------------------------------

// Shuffles of two vectors that are one instruction each; E elements are 16 bytes.
// Of every E elements of a and b the lower or upper halves, W of a and W of b in turn.
template <int E, int W, int UPPER, class V, int... J>
NATRPB_INLINE V interleave(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int n = sizeof...(J);
  return __builtin_shufflevector(a, b, (J / W % 2 * n + J / E * E + UPPER * E / 2 + J % E / (2 * W) * W + J % W)...);
}
// Every second run of E elements of a, then of b.
template <int E, int ODD, class V, int... J>
NATRPB_INLINE V every_second(V a, V b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J / E * 2 + ODD) * E + J % E)...);
}

// Runs of E elements: run j of rows[i * APART] <-> run i of rows[j * APART], as many rows as a vector has runs, up to four.
template <class T, int E, int APART = 1>
NATRPB_INLINE void transpose_runs(Vec<T>* rows) {
  constexpr int kRuns = kLanes<T> / E;
  constexpr auto all = std::make_integer_sequence<int, kLanes<T>>{};
  static_assert(kRuns == 1 || kRuns == 2 || kRuns == 4);
  if constexpr (kRuns > 1) {
    Vec<T>&r0 = rows[0], &r1 = rows[APART];
    const Vec<T> even01 = every_second<E, 0>(r0, r1, all), odd01 = every_second<E, 1>(r0, r1, all);
    if constexpr (kRuns == 2) {
      r0 = even01;
      r1 = odd01;
    } else {
      Vec<T>&r2 = rows[2 * APART], &r3 = rows[3 * APART];
      const Vec<T> even23 = every_second<E, 0>(r2, r3, all), odd23 = every_second<E, 1>(r2, r3, all);
      r0 = every_second<E, 0>(even01, even23, all);
      r1 = every_second<E, 0>(odd01, odd23, all);
      r2 = every_second<E, 1>(even01, even23, all);
      r3 = every_second<E, 1>(odd01, odd23, all);
    }
  }
}

// rows[i][j] <-> rows[j][i], kLanes x kLanes: blocks of E x E within 16 bytes, then runs of 16 bytes across groups of E rows.
template <class T>
NATRPB_INLINE void transpose(Vec<T>* rows) {
  constexpr int N = kLanes<T>, E = 16 / sizeof(T), kGroups = N / E;
  constexpr auto all = std::make_integer_sequence<int, N>{};
  NATRPB_UNROLL for (int group = 0; group < kGroups; ++group) {
    Vec<T>* r = rows + group * E;
    if constexpr (E == 2) {
      const Vec<T> first = interleave<E, 1, 0>(r[0], r[1], all);
      r[1] = interleave<E, 1, 1>(r[0], r[1], all);
      r[0] = first;
    } else {
      const Vec<T> low01 = interleave<E, 1, 0>(r[0], r[1], all), high01 = interleave<E, 1, 1>(r[0], r[1], all);
      const Vec<T> low23 = interleave<E, 1, 0>(r[2], r[3], all), high23 = interleave<E, 1, 1>(r[2], r[3], all);
      r[0] = interleave<E, 2, 0>(low01, low23, all);
      r[1] = interleave<E, 2, 1>(low01, low23, all);
      r[2] = interleave<E, 2, 0>(high01, high23, all);
      r[3] = interleave<E, 2, 1>(high01, high23, all);
    }
  }
  NATRPB_UNROLL for (int row = 0; row < E; ++row) transpose_runs<T, E, E>(rows + row);
}

// The sum of the lanes of rows[l] in lane l. Halves of two vectors meet until one is left: rows that are W apart, within 16 bytes first.
template <class T, int N = kLanes<T>, int W = 1>
NATRPB_INLINE Vec<T> sums_of(const Vec<T>* rows) {
  if constexpr (N == 1) {
    return rows[0];
  } else {
    constexpr int E = 16 / sizeof(T);
    constexpr auto all = std::make_integer_sequence<int, kLanes<T>>{};
    Vec<T> halves[N / 2];
    NATRPB_UNROLL for (int i = 0; i < N / 2; ++i) {
      const Vec<T> a = rows[2 * i], b = rows[2 * i + 1];
      if constexpr (W < E) {
        halves[i] = interleave<E, W, 0>(a, b, all) + interleave<E, W, 1>(a, b, all);
      } else {
        halves[i] = every_second<E, 0>(a, b, all) + every_second<E, 1>(a, b, all);
      }
    }
    return sums_of<T, N / 2, 2 * W>(halves);
  }
}
