#include "emulator_ptx.h"

#include <algorithm>

#include "state.h"

namespace natrpb::emulator {

namespace {

typedef float Row __attribute__((vector_size(32)));  // 8 columns of a matrix
typedef uint32_t RowBits __attribute__((vector_size(32)));
typedef uint16_t HalfRow __attribute__((vector_size(16)));

// The 16-bit values of a type as fp32. Subnormals are exact: the multiplication normalizes them.
struct HalfBits {
  __attribute__((always_inline)) static void to_float(const HalfRow& halves, Row& values) {
    const RowBits bits = __builtin_convertvector(halves, RowBits);
    const RowBits magnitude = reinterpret_cast<RowBits>(reinterpret_cast<Row>((bits & 0x7fffu) << 13) * 0x1p112f);
    const RowBits special = reinterpret_cast<RowBits>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    values = reinterpret_cast<Row>(magnitude | special | (bits & 0x8000u) << 16);
  }
};
struct BfloatBits {
  __attribute__((always_inline)) static void to_float(const HalfRow& halves, Row& values) {
    values = reinterpret_cast<Row>(__builtin_convertvector(halves, RowBits) << 16);
  }
};

template <class Bits>
__attribute__((always_inline)) inline void multiply(void* const (&operands)[kWarpSize]) {
  uint32_t a_bits[16][8], b_bits[8][8];  // pairs of A's columns, pairs of B's rows
  float c[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Mma& mine = *static_cast<const Mma*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a_bits[g + i % 2 * 8][t + i / 2 * 4] = mine.a[i];
    for (int i = 0; i < 2; ++i) b_bits[t + 4 * i][g] = mine.b[i];
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = mine.c[i];
  }
  float a[16][16];
  Row b[16];
  for (int i = 0; i < 32; ++i) {
    HalfRow halves;
    Row values;
    std::memcpy(&halves, &a_bits[i / 2][i % 2 * 4], sizeof halves);
    Bits::to_float(halves, values);
    std::memcpy(&a[i / 2][i % 2 * 8], &values, sizeof values);
  }
  for (int k = 0; k < 16; k += 2) {
    RowBits pairs;
    std::memcpy(&pairs, b_bits[k / 2], sizeof pairs);
    Bits::to_float(__builtin_convertvector(pairs, HalfRow), b[k]);
    Bits::to_float(__builtin_convertvector(pairs >> 16, HalfRow), b[k + 1]);
  }
  for (int i = 0; i < 16; ++i) {
    Row sum;
    std::memcpy(&sum, c[i], sizeof sum);
    for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k];
    std::memcpy(c[i], &sum, sizeof sum);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Mma& mine = *static_cast<const Mma*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) mine.c[i] = c[g + i / 2 * 8][2 * t + i % 2];
  }
}

#ifdef __x86_64__
template <class Bits>
__attribute__((target("avx2"))) void multiply_avx2(void* const (&operands)[kWarpSize]) {
  multiply<Bits>(operands);
}
#endif

template <class Bits>
void mma(void* const (&operands)[kWarpSize], uint32_t) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2")) return multiply_avx2<Bits>(operands);
#endif
  multiply<Bits>(operands);
}

// Wavefronts that the 16-byte accesses of `lanes` lanes need: in each group of 8 lanes one for every different address in the
// most wanted of the 8 quads of banks. A group without an access needs none.
void count_wavefronts(const void* const* addresses, uint32_t lanes, int64_t& total, int64_t& conflicts) {
  for (int phase = 0; phase < kWarpSize; phase += 8) {
    if (!(lanes >> phase & 0xff)) continue;
    uintptr_t seen[8][8];
    int wanted[8] = {};
    for (int lane = phase; lane < phase + 8; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      const uintptr_t chunk = reinterpret_cast<uintptr_t>(addresses[lane]) / 16;
      uintptr_t* quad = seen[chunk % 8];
      int& count = wanted[chunk % 8];
      if (std::find(quad, quad + count, chunk) == quad + count) quad[count++] = chunk;
    }
    const int worst = *std::max_element(wanted, wanted + 8);
    total += worst;
    conflicts += worst - 1;
  }
}

template <int N, bool kTranspose>
void load_matrices(void* const (&operands)[kWarpSize], uint32_t) {
  const void* addresses[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) addresses[lane] = static_cast<const Ldmatrix*>(operands[lane])->address;
  const uint32_t lanes = N == 4 ? kFullMask : (1u << 8 * N) - 1;
  count_wavefronts(addresses, lanes, block.wavefronts->ldmatrix, block.wavefronts->ldmatrix_conflicts);
  for (int i = 0; i < N; ++i) {
    const uint16_t* rows[8];
    for (int r = 0; r < 8; ++r) rows[r] = static_cast<const Ldmatrix*>(operands[8 * i + r])->row;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = kTranspose ? rows[2 * t][g] : rows[g][2 * t];
      const uint16_t high = kTranspose ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
      static_cast<Ldmatrix*>(operands[lane])->result[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace

const Collective kLdmatrixX4{"ldmatrix_x4", load_matrices<4, false>};
const Collective kLdmatrixX4Trans{"ldmatrix_x4_trans", load_matrices<4, true>};
const Collective kLdmatrixX2{"ldmatrix_x2", load_matrices<2, false>};
const Collective kMmaHalf{"mma_16816<__half>", mma<HalfBits>};
const Collective kMmaBfloat16{"mma_16816<__nv_bfloat16>", mma<BfloatBits>};

void copy_started(void* shared, uint4 value) {
  current->copies.push_back({shared, value, current->groups_committed});
  ++block.copies_to(shared);
}

void copies_committed() { ++current->groups_committed; }

bool copy_finished(int pending, void*& shared, uint4& value) {
  Thread& self = *current;
  if (self.first_copy == self.copies.size()) {
    self.copies.clear();
    self.first_copy = 0;
    return false;
  }
  const PendingCopy& oldest = self.copies[self.first_copy];
  if (oldest.group >= self.groups_committed - pending) return false;
  shared = oldest.shared;
  value = oldest.value;
  ++self.first_copy;
  --block.copies_to(shared);
  return true;
}

void count_shared_load(const void* address, Site site) {
  // The log is memory that all lanes allocate and free: ThreadSanitizer would report it.
  if constexpr (kThreadSanitizer) return;
  Warp& warp = *current->warp;
  const int lane = current->lane;
  auto log = std::find_if(warp.load_logs.begin(), warp.load_logs.end(),
                          [&](const SharedLoadLog& known) { return same_site(known.site, site); });
  if (log == warp.load_logs.end()) {
    warp.load_logs.push_back({});
    log = warp.load_logs.end() - 1;
    log->site = site;
  }
  const size_t index = static_cast<size_t>(log->next[lane]++);
  if (index == log->loads.size()) log->loads.emplace_back();
  SharedLoad& load = log->loads[index];
  load.lanes |= 1u << lane;
  load.address[lane] = address;
  if (index == 0 && load.lanes == kFullMask) {
    count_wavefronts(load.address, load.lanes, block.wavefronts->load, block.wavefronts->load_conflicts);
    log->loads.pop_front();
    for (int64_t& next : log->next) --next;
  }
}

// Loads that some lanes skipped.
void finish_shared_loads() {
  for (Warp& warp : block.warps) {
    for (SharedLoadLog& log : warp.load_logs) {
      for (const SharedLoad& load : log.loads) {
        count_wavefronts(load.address, load.lanes, block.wavefronts->load, block.wavefronts->load_conflicts);
      }
    }
    warp.load_logs.clear();
  }
}

}  // namespace natrpb::emulator
