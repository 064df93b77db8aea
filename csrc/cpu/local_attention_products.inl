// Products of small matrices in scratch memory: c = start + scale a b, b and c made of whole vectors, a of factors.

// Where a's factors lie: (row, word) at a[row * step + word], or at a[row + word * step].
enum class Order { kRows, kColumns };

template <class T>
struct Product {
  const T* a;
  int64_t a_step;
  const T* b;  // [word][b_step]
  int64_t b_step;
  int64_t words;
  T* c;  // [row][c_step]
  int64_t c_step;
  T scale;
  const T* start;  // [row][start_step]; nullptr: zeros
  int64_t start_step;
};

// ROWS x VECTORS accumulators; VECTORS of b and one factor of a beside them must fit the register file.
template <class F, Order O, int ROWS, int VECTORS>
void product_tile(const Product<Compute<F>>& m) {
  using T = Compute<F>;
  constexpr int L = kLanes<T>;
  const int64_t step = O == Order::kColumns ? m.a_step : 1;
  const T* a[ROWS];
  NATRPB_UNROLL for (int i = 0; i < ROWS; ++i) a[i] = m.a + i * (O == Order::kColumns ? 1 : m.a_step);
  const T* b = m.b;
  Vec<T> acc[ROWS][VECTORS] = {};
  for (int64_t w = 0; w < m.words; ++w, b += m.b_step) {
    Vec<T> row[VECTORS];
    NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) row[v] = in_register(load(b + v * L));
    NATRPB_UNROLL for (int i = 0; i < ROWS; ++i) {
      const Vec<T> factor = in_register(splat(a[i][w * step]));
      NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] = multiply_add<F>(acc[i][v], factor, row[v]);
    }
  }
  const Vec<T> scale = splat(m.scale);
  T* c = m.c;
  const T* start = m.start;
  const int64_t c_step = m.c_step, start_step = m.start_step;  // stores may change m, for all that the compiler knows
  const auto write = [&](auto starts) NATRPB_LAMBDA {
    NATRPB_UNROLL for (int i = 0; i < ROWS; ++i) {
      NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) {
        const Vec<T> sum = scale * acc[i][v];
        store(c + i * c_step + v * L, decltype(starts)::value ? load(start + i * start_step + v * L) + sum : sum);
      }
    }
  };
  start ? write(Const<true>{}) : write(Const<false>{});
}

#ifdef NATRPB_TILES
inline constexpr bool kTiles = true;  // of AMX, two by two
inline constexpr int kProductRows = 32, kProductVectors = 2;
#else
inline constexpr bool kTiles = false;
inline constexpr int kProductRows = NATRPB_VECTOR_BYTES == 64 ? 8 : 5;
inline constexpr int kProductVectors = NATRPB_VECTOR_BYTES == 64 ? 3 : 2;
#endif

template <class T>
using ProductTile = void (*)(const Product<T>&);

template <class F, Order O, int... I>
NATRPB_INLINE ProductTile<Compute<F>> pick_product_tile(int index, std::integer_sequence<int, I...>) {
  static constexpr ProductTile<Compute<F>> tiles[] = {&product_tile<F, O, I / kProductVectors + 1, I % kProductVectors + 1>...};
  return tiles[index];
}

// c = start + scale a b for `rows` rows and `columns` columns, a multiple of kLanes; between() is called between tiles. Sums of more
// than `run` words are made of parts: a single long chain of fp32 additions, begun from a large bias at that, would err several
// times more.
template <class F, Order O, class Between>
void multiply(const Product<Compute<F>>& m, int64_t rows, int64_t columns, int64_t run, Between&& between) {
  using T = Compute<F>;
  constexpr int L = kLanes<T>;
  if (columns == 0) return;
  // Equal shares: a narrow tile has more loads for its products.
  const int64_t tall = ceil_div(rows, ceil_div(rows, kProductRows));
  const int64_t wide = ceil_div(columns / L, ceil_div(columns, kProductVectors * L)) * L;
  for (int64_t j = 0; j < columns; j += wide) {
    const int64_t vectors = min_of(wide, columns - j) / L;
    for (int64_t i = 0; i < rows; i += tall) {
      const int64_t n = min_of(tall, rows - i);
      const auto tile = pick_product_tile<F, O>(static_cast<int>((n - 1) * kProductVectors + vectors - 1),
                                                std::make_integer_sequence<int, kProductRows * kProductVectors>{});
      Product<T> part = m;
      part.c += i * m.c_step + j;
      if (m.start) part.start += i * m.start_step + j;
      for (int64_t w = 0; w < m.words; w += run) {
        part.a = m.a + (O == Order::kColumns ? i + w * m.a_step : i * m.a_step + w);
        part.b = m.b + w * m.b_step + j;
        part.words = min_of(run, m.words - w);
        tile(part);
        part.start = part.c;
        part.start_step = part.c_step;
      }
      between();
    }
  }
}

#ifdef NATRPB_TILES
// The same of pairs, by tiles of AMX. NB: reads and writes whole tiles: rows of a and c up to a multiple of 16, words of a and rows of b
// too, where one of the two must be zero and the other one finite.
template <class Between>
void multiply_by_tiles(const Product<float>& m, int64_t rows, int64_t columns, Between&& between) {
  constexpr int kN = 16;
  const bool add = m.start == m.c;
  for (int64_t i = 0; i < rows; i += 2 * kN) {
    for (int64_t j = 0; j < columns; j += 2 * kN) {
      const float *a = m.a + i * m.a_step, *b = m.b + j;
      float* c = m.c + i * m.c_step + j;
      const bool two_rows = rows - i > kN, two_columns = columns - j > kN;
      const auto tiles = two_rows      ? two_columns ? &multiply_tiles<2, 2> : &multiply_tiles<2, 1>
                         : two_columns ? &multiply_tiles<1, 2>
                                       : &multiply_tiles<1, 1>;
      tiles(a, m.a_step, b, m.b_step, m.words, c, m.c_step, add);
      between();
      if (!add && (m.start || m.scale != 1)) {
        const Vec<float> scale = splat(m.scale);
        for (int64_t row = 0; row < min_of(2 * kN, rows - i); ++row, c += m.c_step) {
          const float* start = m.start ? m.start + (i + row) * m.start_step + j : nullptr;
          for (int64_t column = 0; column < (two_columns ? 2 * kN : kN); column += kN) {
            const Vec<float> sum = scale * load(c + column);
            store(c + column, start ? load(start + column) + sum : sum);
          }
        }
      }
    }
  }
}
#endif
