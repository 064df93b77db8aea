// Matrix products of small dense tiles, which every product of the attention is made of:
//
//   c[i][j] (+)= sum_k a(i,k) * b[k][j],   a(i,k) = a.data[i * a.row + k * a.step]
//
// Lanes are columns of b and c, which are padded to whole vectors. A register tile of kTileRows x kTileVectors accumulators
// shares every load of b between its rows; a's elements are broadcast, so a may be a transposed view at no cost.

// Accumulators, one row of b and one element of a must fit the register file.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = NATRPB_VECTOR_BYTES == 64 ? 4 : 2;

template <class T>
struct Factor {
  const T* data;
  int64_t row, step;
};

template <class T>
struct TileArgs {
  Factor<T> a;
  const T* b;
  int64_t b_step;
  int64_t depth;
  T* c;
  int64_t c_step;
  bool add;
};

template <class T, int ROWS, int VECTORS>
void product_tile(const TileArgs<T>& args) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[ROWS][VECTORS] = {};
  const T *a = args.a.data, *b = args.b;
  const int64_t a_row = args.a.row;
  for (int64_t k = args.depth; k > 0; --k, a += args.a.step, b += args.b_step) {
    Vec<T> row[VECTORS];
    NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) row[v] = load(b + v * L);
    NATRPB_UNROLL for (int i = 0; i < ROWS; ++i) {
      const Vec<T> x = splat(a[i * a_row]);
      NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] += x * row[v];
    }
  }
  NATRPB_UNROLL for (int i = 0; i < ROWS; ++i) {
    NATRPB_UNROLL for (int v = 0; v < VECTORS; ++v) {
      T* c = args.c + i * args.c_step + v * L;
      store(c, args.add ? load(c) + acc[i][v] : acc[i][v]);
    }
  }
}

template <class T, int... I>
void run_tile(int rows, int vectors, const TileArgs<T>& args, std::integer_sequence<int, I...>) {
  static constexpr void (*tiles[])(const TileArgs<T>&) = {&product_tile<T, I / kTileVectors + 1, I % kTileVectors + 1>...};
  tiles[(rows - 1) * kTileVectors + vectors - 1](args);
}

// c[rows][columns] (+)= a b; columns is a multiple of kLanes.
template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Factor<T>& a, const T* b, int64_t b_step, T* c,
              int64_t c_step, bool add) {
  constexpr int L = kLanes<T>;
  const int64_t vectors = columns / L;
  if (rows == 0 || vectors == 0) return;
  // Equal shares: a narrow last tile would wait for its few additions.
  const int64_t share = ceil_div(vectors, ceil_div(vectors, kTileVectors));
  const int64_t tall = ceil_div(rows, ceil_div(rows, kTileRows));
  for (int64_t v = 0; v < vectors; v += share) {
    for (int64_t i = 0; i < rows; i += tall) {
      const TileArgs<T> args{
          {a.data + i * a.row, a.row, a.step}, b + v * L, b_step, depth, c + i * c_step + v * L, c_step, add};
      run_tile<T>(static_cast<int>(min_of(tall, rows - i)), static_cast<int>(min_of(share, vectors - v)), args,
                  std::make_integer_sequence<int, kTileRows * kTileVectors>{});
    }
  }
}
