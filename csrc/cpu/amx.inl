// The tile registers of AMX: eight matrices of 16 rows of 64 bytes. With NATRPB_TILE_TWIN they are plain arrays and loops, so that
// tests run on any machine.

#ifdef NATRPB_TILE_TWIN
struct TileTwin {
  float row[16][16];
};
inline thread_local TileTwin tile_twin[8];

NATRPB_INLINE void tile_configure() {
  for (TileTwin& tile : tile_twin) tile = {};
}
NATRPB_INLINE void tile_release() {}
template <int TILE>
NATRPB_INLINE void tile_zero() {
  tile_twin[TILE] = {};
}
template <int TILE>
NATRPB_INLINE void tile_load(const float* p, int64_t step) {
  for (int i = 0; i < 16; ++i) __builtin_memcpy(tile_twin[TILE].row[i], p + i * step, 64);
}
template <int TILE>
NATRPB_INLINE void tile_store(float* p, int64_t step) {
  for (int i = 0; i < 16; ++i) __builtin_memcpy(p + i * step, tile_twin[TILE].row[i], 64);
}
template <int SUM, int A, int B>
NATRPB_INLINE void tile_multiply_pairs() {
  for (int i = 0; i < 16; ++i) {
    Vec<float> sum = load(tile_twin[SUM].row[i]);
    for (int w = 0; w < 16; ++w) {
      sum = multiply_add<Pair>(sum, splat(tile_twin[A].row[i][w]), load(tile_twin[B].row[w]));
    }
    store(tile_twin[SUM].row[i], sum);
  }
}
#else
// A thread's tiles, until it releases them. NB: the instructions as text: the intrinsics take literal numbers only.
NATRPB_INLINE void tile_configure() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  static_assert(sizeof config == 64);
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
NATRPB_INLINE void tile_release() { __asm__ volatile("tilerelease" : : : "memory"); }
template <int TILE>
NATRPB_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
// Rows p[i * step ...], 16 numbers each.
template <int TILE>
NATRPB_INLINE void tile_load(const float* p, int64_t step) {
  __asm__ volatile("tileloadd (%0,%1,4), %%tmm%c2" : : "r"(p), "r"(step), "i"(TILE) : "memory");
}
template <int TILE>
NATRPB_INLINE void tile_store(float* p, int64_t step) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,4)" : : "r"(p), "r"(step), "i"(TILE) : "memory");
}
// sum[i][j] += a[i][w] . b[w][j], of pairs of bf16, added in fp32.
template <int SUM, int A, int B>
NATRPB_INLINE void tile_multiply_pairs() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}
#endif

// c (+)= a b for up to ROWS x COLUMNS tiles of 16 x 16 numbers, over `words` rows of b: whole tiles are read and written.
template <int ROWS, int COLUMNS>
void multiply_tiles(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t words, float* c, int64_t c_step,
                    bool add) {
  constexpr int kN = 16, kA = 4, kB = 6;  // sums are tiles 0 to 3
  const auto for_sums = [&](auto&& sum) NATRPB_LAMBDA {
    unroll<ROWS>([&](auto i) NATRPB_LAMBDA {
      unroll<COLUMNS>([&](auto j) NATRPB_LAMBDA { sum(i, j, Const<decltype(i)::value * 2 + decltype(j)::value>{}); });
    });
  };
  for_sums([&](auto i, auto j, auto tile) NATRPB_LAMBDA {
    constexpr int kTile = decltype(tile)::value;
    add ? tile_load<kTile>(c + i.value * kN * c_step + j.value * kN, c_step) : tile_zero<kTile>();
  });
  for (int64_t w = 0; w < words; w += kN) {
    unroll<ROWS>([&](auto i) NATRPB_LAMBDA { tile_load<kA + decltype(i)::value>(a + i.value * kN * a_step + w, a_step); });
    unroll<COLUMNS>([&](auto j) NATRPB_LAMBDA { tile_load<kB + decltype(j)::value>(b + w * b_step + j.value * kN, b_step); });
    for_sums([&](auto i, auto j, auto tile) NATRPB_LAMBDA {
      tile_multiply_pairs<decltype(tile)::value, kA + decltype(i)::value, kB + decltype(j)::value>();
    });
  }
  for_sums([&](auto i, auto j, auto tile)
               NATRPB_LAMBDA { tile_store<decltype(tile)::value>(c + i.value * kN * c_step + j.value * kN, c_step); });
}
