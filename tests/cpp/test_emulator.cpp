// The emulator against plain loops: collectives, barriers, fragments, cp.async, conflict counts, launch limits.
// test_emulator_faults.cpp holds what it must refuse.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"

#ifdef __SANITIZE_THREAD__
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

namespace {

using natrpb::Status;
using natrpb::cuda::launch;
using natrpb::cuda::shared_memory;
using natrpb::test::check;
namespace emulator = natrpb::emulator;
namespace ptx = natrpb::cuda::ptx;

constexpr uint32_t kFull = 0xffffffffu;

template <class... P>
void run(const char* name, void (*kernel)(P...), dim3 grid, int threads, int64_t shared_bytes, const P&... params) {
  const Status status = launch(kernel, grid, threads, shared_bytes, nullptr, params...);
  check(status.ok(), [&] { return std::string(name) + ": " + status.message(); });
}

// Collectives ---------------------------------------------------------------------------------------------------------------

template <class T>
__global__ void shuffles(T* out) {  // out [4, 32]
  const int lane = threadIdx.x;
  const T value = static_cast<T>(3 * lane + 1);
  out[lane] = __shfl_sync(kFull, value, 7);
  out[32 + lane] = __shfl_xor_sync(kFull, value, 5);
  out[64 + lane] = __shfl_down_sync(kFull, value, 6u);
  out[96 + lane] = __shfl_sync(kFull, value, 3, 8);
}

template <class T>
void test_shuffles(const char* name) {
  std::vector<T> out(4 * 32);
  run(name, shuffles<T>, dim3(1), 32, 0, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int sources[] = {7, lane ^ 5, lane + 6 < 32 ? lane + 6 : lane, lane / 8 * 8 + 3};
    for (int i = 0; i < 4; ++i) {
      check(out[32 * i + lane] == static_cast<T>(3 * sources[i] + 1),
            [&] { return std::string(name) + " shuffle " + std::to_string(i) + " lane " + std::to_string(lane); });
    }
  }
}

// Lanes of one warp in two groups that take different numbers of turns, then together again.
__global__ void votes(uint32_t* out) {  // out [4, 32]
  const int lane = threadIdx.x;
  const uint32_t group = lane < 12 ? 0x00000fffu : 0xfffff000u;
  uint32_t sum = 0;
  for (int turn = 0; turn < (lane < 12 ? 5 : 2); ++turn) sum += __ballot_sync(group, lane % 2 == turn % 2);
  out[lane] = sum;
  __syncwarp();
  out[32 + lane] = __ballot_sync(kFull, lane % 3 == 0);
  out[64 + lane] = __any_sync(group, lane == 3);
  out[96 + lane] = __all_sync(group, lane >= 12);
}

void test_votes() {
  std::vector<uint32_t> out(4 * 32);
  run("votes", votes, dim3(1), 32, 0, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    const bool low = lane < 12;
    check(out[lane] == (low ? 3 * 0x555u + 2 * 0xaaau : 0x55555000u + 0xaaaaa000u), [] { return "ballots of groups"; });
    check(out[32 + lane] == 0x49249249u, [] { return "ballot of the warp"; });
    check(out[64 + lane] == low && out[96 + lane] == !low, [] { return "any, all"; });
  }
}

// Barriers ------------------------------------------------------------------------------------------------------------------

// Reverses blocks of `blockDim.x` numbers; threads from `leavers` on exit before the last barrier.
__global__ void reverse_blocks(const int* in, int* out, int leavers) {
  int* buffer = shared_memory<int>();
  const int t = threadIdx.x;
  const int64_t start = (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * blockDim.x;
  buffer[t] = in[start + t];
  __syncthreads();
  const int value = buffer[blockDim.x - 1 - t];
  out[start + t] = value;
  __syncthreads();
  if (t >= leavers) return;
  buffer[t] = value;
  __syncthreads();
  out[start + t] = buffer[leavers - 1 - t];
}

void test_barriers() {
  for (const int threads : {2, 31, 64, 100, kThreadSanitizer ? 256 : 1024}) {
    const int leavers = threads / 2;
    std::vector<int> in(6 * threads), out(6 * threads, -1);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * 7);
    const int* source = in.data();
    run("reverse_blocks", reverse_blocks, dim3(3, 2), threads, int64_t{4} * threads, source, out.data(), leavers);
    for (size_t i = 0; i < in.size(); ++i) {
      const int t = static_cast<int>(i) % threads, start = static_cast<int>(i) - t;
      const int reversed = t < leavers ? leavers - 1 - t : t;
      check(out[i] == in[start + threads - 1 - reversed],
            [&] { return "reverse of " + std::to_string(threads) + " at " + std::to_string(i); });
    }
  }
}

__global__ void read_fresh_memory(float* out) {
  float* memory = shared_memory<float>();
  out[blockIdx.x * blockDim.x + threadIdx.x] = memory[threadIdx.x];
  memory[threadIdx.x] = 1.0f;
}

void test_poison() {
  std::vector<float> out(3 * 32, 0.0f);
  run("read_fresh_memory", read_fresh_memory, dim3(3), 32, 128, out.data());
  for (const float value : out) check(std::isnan(value), [] { return "shared memory is not poisoned for every block"; });
}

// Tensor cores --------------------------------------------------------------------------------------------------------------

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <class T>
float to_float(T x) {
  uint16_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return ptx::unpack<T>(bits).x;
}

// C [64, 64] = A [64, depth] B [depth, 64], row by row, depth in steps of 64 through two stages of shared memory. Four warps;
// warp w owns rows 16 w to 16 w + 15. A tile's rows are 128 bytes, its 16-byte chunks swizzled by row % 8, so that ldmatrix meets
// no bank conflict.
template <class T>
__global__ void gemm_tile(const T* a, const T* b, float* c, int depth) {
  T* shared = shared_memory<T>();
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  const auto chunk = [&](int stage, int matrix, int row, int column) {
    return shared + (2 * stage + matrix) * 64 * 64 + row * 64 + (column / 8 ^ row % 8) * 8;
  };
  const auto fetch = [&](int step) {
    for (int i = t; i < 64 * 8 && step * 64 < depth; i += 128) {
      const int row = i / 8, column = i % 8 * 8;
      ptx::cp_async_16(chunk(step % 2, 0, row, column), a + int64_t{row} * depth + step * 64 + column, true);
      ptx::cp_async_16(chunk(step % 2, 1, row, column), b + (int64_t{step} * 64 + row) * 64 + column, true);
    }
    ptx::cp_async_commit();
  };
  float sum[8][4] = {};
  fetch(0);
  for (int step = 0; step * 64 < depth; ++step) {
    fetch(step + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    for (int k = 0; k < 64; k += 16) {
      uint32_t a_fragment[4], b_fragment[4];
      ptx::ldmatrix_x4(a_fragment, chunk(step % 2, 0, 16 * warp + lane % 16, k + lane / 16 * 8));
      for (int n = 0; n < 64; n += 16) {
        ptx::ldmatrix_x4_trans(b_fragment, chunk(step % 2, 1, k + lane % 16, n + lane / 16 * 8));
        ptx::mma_16816<T>(sum[n / 8], a_fragment, {b_fragment[0], b_fragment[1]});
        ptx::mma_16816<T>(sum[n / 8 + 1], a_fragment, {b_fragment[2], b_fragment[3]});
      }
    }
    __syncthreads();
  }
  for (int n = 0; n < 8; ++n) {
    for (int half = 0; half < 2; ++half) {
      float* row = c + (16 * warp + lane / 4 + 8 * half) * 64 + 8 * n + lane % 4 * 2;
      ptx::store_8(row, {__float_as_uint(sum[n][2 * half]), __float_as_uint(sum[n][2 * half + 1])});
    }
  }
}

constexpr int kGemmDepth = 192;
constexpr int64_t kGemmShared = 4 * 64 * 64 * 2;

template <class T>
struct GemmData {
  std::vector<T> a, b;
  std::vector<float> c = std::vector<float>(64 * 64, NAN);

  GemmData() {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int i = 0; i < 64 * kGemmDepth; ++i) a.push_back(from_float<T>(normal(random)));
    for (int i = 0; i < 64 * kGemmDepth; ++i) b.push_back(from_float<T>(normal(random)));
  }

  double worst_error() {
    const T *left = a.data(), *right = b.data();
    run("gemm_tile", gemm_tile<T>, dim3(1), 128, kGemmShared, left, right, c.data(), kGemmDepth);
    double worst = 0.0;
    for (int i = 0; i < 64; ++i) {
      for (int j = 0; j < 64; ++j) {
        double sum = 0.0;
        for (int k = 0; k < kGemmDepth; ++k) {
          sum += static_cast<double>(to_float(a[i * kGemmDepth + k])) * to_float(b[k * 64 + j]);
        }
        const double error = std::abs(sum - c[i * 64 + j]);
        worst = error <= worst ? worst : error;  // NaN counts as worst
      }
    }
    return worst;
  }
};

template <class T>
void test_gemm(const char* name) {
  GemmData<T> data;
  emulator::reset_counters();
  const double error = data.worst_error();
  check(error < 1e-4, [&] { return std::string("gemm ") + name + ": error " + std::to_string(error); });
  const auto counters = emulator::counters();
  check(counters.size() == 1 && counters[0].kernel.find("gemm_tile") != std::string::npos && counters[0].launches == 1 &&
            counters[0].blocks == 1,
        [&] { return "counters name " + (counters.empty() ? std::string("nothing") : counters[0].kernel); });
  // 4 warps, 3 steps of 4 k: one A and four B fragments of 4 matrices each.
  check(counters[0].ldmatrix_wavefronts == 4 * 3 * 4 * 5 * 4 && counters[0].ldmatrix_conflicts == 0,
        [] { return "wavefronts of a swizzled tile"; });
}

// Fragments of ldmatrix as the PTX ISA draws them; matrix m, row r, column c holds 100 m + 10 r + c.
__global__ void load_fragments(uint32_t* out) {  // out [3, 32, 4]
  uint16_t* matrices = shared_memory<uint16_t>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 4 * 64; i += 32) matrices[i] = static_cast<uint16_t>(i / 64 * 100 + i % 64 / 8 * 10 + i % 8);
  __syncwarp();
  uint32_t straight[4], transposed[4], two[2];
  ptx::ldmatrix_x4(straight, matrices + 8 * lane);
  ptx::ldmatrix_x4_trans(transposed, matrices + 8 * lane);
  ptx::ldmatrix_x2(two, lane < 16 ? matrices + 8 * lane : nullptr);
  for (int i = 0; i < 4; ++i) {
    out[lane * 4 + i] = straight[i];
    out[(32 + lane) * 4 + i] = transposed[i];
    if (i < 2) out[(64 + lane) * 4 + i] = two[i];
  }
}

void test_fragments() {
  std::vector<uint32_t> out(3 * 32 * 4);
  run("load_fragments", load_fragments, dim3(1), 32, 4 * 64 * 2, out.data());
  for (int form = 0; form < 3; ++form) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < (form < 2 ? 4 : 2); ++m) {
        const bool transposed = form == 1;
        const int row = lane / 4, column = lane % 4 * 2;
        const uint32_t low = 100 * m + (transposed ? 10 * column + row : 10 * row + column);
        const uint32_t high = low + (transposed ? 10 : 1);
        check(out[(form * 32 + lane) * 4 + m] == (low | high << 16),
              [&] { return "ldmatrix form " + std::to_string(form) + " lane " + std::to_string(lane); });
      }
    }
  }
}

// Special values of both 16-bit types through pack, unpack and a product with the identity.
template <class T>
__global__ void multiply_by_identity(const float* in, float* out) {  // in, out [16, 8]
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t one_low = ptx::pack<T>(1.0f, 0.0f), one_high = ptx::pack<T>(0.0f, 1.0f);
  const uint32_t diagonal = g / 2 == t ? (g % 2 == 0 ? one_low : one_high) : 0u;
  const uint32_t a[4] = {diagonal, 0u, 0u, diagonal};
  uint32_t b[2];
  for (int i = 0; i < 2; ++i) b[i] = ptx::pack<T>(in[(2 * t + 8 * i) * 8 + g], in[(2 * t + 1 + 8 * i) * 8 + g]);
  float c[4] = {};
  ptx::mma_16816<T>(c, a, b);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

template <class T>
void test_identity(const char* name, float smallest, float largest) {
  std::vector<float> in(16 * 8), out(16 * 8);
  for (int i = 0; i < 16 * 8; ++i) in[i] = static_cast<float>(i % 2 ? -i : i) / 64.0f;
  in[8] = smallest;
  in[17] = -3 * smallest;
  in[26] = largest;
  const float* source = in.data();
  run("multiply_by_identity", multiply_by_identity<T>, dim3(1), 32, 0, source, out.data());
  check(out == in, [&] { return std::string(name) + " times the identity"; });
  check(to_float(from_float<T>(smallest * 0.5f)) == 0.0f && std::isinf(to_float(from_float<T>(INFINITY))) &&
            std::isnan(to_float(from_float<T>(NAN))),
        [&] { return std::string(name) + ": rounding of special values"; });
  check(ptx::unpack<T>(ptx::pack<T>(1.5f, -2.0f)).y == -2.0f, [&] { return std::string(name) + ": order of halves"; });
}

void test_approximations() {
  check(ptx::exp2_approx(3.0f) == 8.0f && ptx::exp2_approx(-INFINITY) == 0.0f && ptx::exp2_approx(-140.0f) == 0.0f,
        [] { return "exp2_approx"; });
  check(ptx::log2_approx(8.0f) == 3.0f && ptx::log2_approx(1e-40f) == -INFINITY, [] { return "log2_approx"; });
  check(ptx::rcp_approx(4.0f) == 0.25f && std::isinf(ptx::rcp_approx(1e-40f)), [] { return "rcp_approx"; });
}

// cp.async ------------------------------------------------------------------------------------------------------------------

// What a thread sees of its own copies: after issue, after waits that leave 1 and 0 groups, and of a copy never committed.
__global__ void watch_copies(const float* in, float* out) {  // in [3, 4], out [9]
  float* memory = shared_memory<float>();
  ptx::cp_async_16(memory, in, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(memory + 4, in + 4, true);
  ptx::cp_async_16(memory + 8, nullptr, false);
  ptx::cp_async_commit();
  ptx::cp_async_16(memory + 12, in + 8, true);
  for (int i = 0; i < 2; ++i) out[i] = memory[4 * i];
  ptx::cp_async_wait<1>();
  for (int i = 0; i < 3; ++i) out[2 + i] = memory[4 * i];
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[5 + i] = memory[4 * i];
}

void test_copies() {
  std::vector<float> in(12), out(9);
  for (int i = 0; i < 12; ++i) in[i] = static_cast<float>(i + 1);
  const float* source = in.data();
  run("watch_copies", watch_copies, dim3(1), 1, 64, source, out.data());
  const float nan = NAN;
  const float expected[] = {nan, nan, 1.0f, nan, nan, 1.0f, 5.0f, 0.0f, nan};
  for (int i = 0; i < 9; ++i) {
    check(std::isnan(expected[i]) ? std::isnan(out[i]) : out[i] == expected[i],
          [&] { return "cp.async observation " + std::to_string(i) + " is " + std::to_string(out[i]); });
  }
}

// Bank conflicts ------------------------------------------------------------------------------------------------------------

__global__ void read_with_stride(int stride, uint32_t* out) {
  unsigned char* memory = shared_memory<unsigned char>();
  uint32_t registers[4];
  for (int i = threadIdx.x; i < 8192 / 4; i += 32) reinterpret_cast<uint32_t*>(memory)[i] = i;
  __syncwarp();
  ptx::ldmatrix_x4(registers, memory + threadIdx.x * stride);
  const uint4 loaded = ptx::load_shared_16(memory + threadIdx.x * stride);
  out[threadIdx.x] = registers[0] + loaded.x;
  if (threadIdx.x < 8) out[threadIdx.x] += ptx::load_shared_16(memory + threadIdx.x * stride).y;
}

void test_conflicts() {
  struct Pattern {
    int stride;
    int64_t conflicts;  // of one warp-wide access
  };
  // 16-byte rows one after the other; one row for all (broadcast); rows a bank line apart; two lines' worth over 8 lanes.
  for (const Pattern pattern : {Pattern{16, 0}, Pattern{0, 0}, Pattern{128, 4 * 7}, Pattern{32, 4 * 1}}) {
    std::vector<uint32_t> out(32);
    emulator::reset_counters();
    run("read_with_stride", read_with_stride, dim3(1), 32, 8192, pattern.stride, out.data());
    const emulator::Counters counters = emulator::counters().at(0);
    check(counters.ldmatrix_conflicts == pattern.conflicts && counters.ldmatrix_wavefronts == 4 + pattern.conflicts,
          [&] { return "ldmatrix conflicts at stride " + std::to_string(pattern.stride); });
    if (kThreadSanitizer) continue;  // loads are not counted there
    check(counters.load_conflicts == pattern.conflicts / 4 * 5 && counters.load_wavefronts == 5 + pattern.conflicts / 4 * 5,
          [&] { return "load conflicts at stride " + std::to_string(pattern.stride); });
  }
}

// Launches ------------------------------------------------------------------------------------------------------------------

__global__ void count_blocks(int64_t* count) { ++*count; }

void test_launches() {
  int64_t count = 0;
  run("no blocks", count_blocks, dim3(0, 3), 1, 0, &count);
  check(count == 0, [] { return "a grid with a zero extent ran"; });
  run("most shared memory", count_blocks, dim3(2, 3, 4), 1, 232448, &count);
  check(count == 24, [] { return "number of blocks"; });
  const auto refused = [&](dim3 grid, int threads, int64_t shared_bytes) {
    const Status status = launch(count_blocks, grid, threads, shared_bytes, nullptr, &count);
    check(!status.ok() && status.message().find("count_blocks") != std::string::npos,
          [] { return "a launch beyond the limits"; });
  };
  refused(dim3(1), 32, 232449);
  refused(dim3(1), 1025, 0);
  refused(dim3(1, 65536), 32, 0);
  setenv("NATRPB_EMULATOR_SHARED", "101376", 1);
  refused(dim3(1), 32, 101377);
  check(natrpb::cuda::device_limits().block_shared_bytes == 101376, [] { return "the limit of a smaller device"; });
  unsetenv("NATRPB_EMULATOR_SHARED");
  check(count == 24, [] { return "a refused launch ran"; });
}

// Order -----------------------------------------------------------------------------------------------------------------------

// Which block, warp and lane came when; `visits` counts.
__global__ void note_order(int* order, int* visits) {
  __syncwarp();
  order[(*visits)++] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// NB: threads that count in one place race by design, which ThreadSanitizer would report.
void test_order() {
  constexpr int kThreads = 3 * 64;
  std::vector<int> forward(kThreads), backward(kThreads);
  int visits = 0;
  setenv("NATRPB_EMULATOR_ORDER", "forward", 1);
  run("note_order", note_order, dim3(3), 64, 0, forward.data(), &visits);
  setenv("NATRPB_EMULATOR_ORDER", "reverse", 1);
  visits = 0;
  run("note_order", note_order, dim3(3), 64, 0, backward.data(), &visits);
  unsetenv("NATRPB_EMULATOR_ORDER");
  check(forward[0] < 32 && backward[0] >= kThreads - 32, [] { return "first and last warp in both orders"; });
  check(std::is_permutation(forward.begin(), forward.end(), backward.begin()), [] { return "threads that ran"; });
}

}  // namespace

int main() {
  test_shuffles<float>("float");
  test_shuffles<double>("double");
  test_shuffles<int>("int");
  test_shuffles<uint32_t>("uint32_t");
  test_shuffles<int64_t>("int64_t");
  test_votes();
  test_barriers();
  test_poison();
  test_gemm<__half>("half");
  test_gemm<__nv_bfloat16>("bfloat16");
  test_fragments();
  test_identity<__half>("half", 0x1p-24f, 65504.0f);
  test_identity<__nv_bfloat16>("bfloat16", 0x1p-133f, 0x1.fep127f);
  test_approximations();
  test_copies();
  test_conflicts();
  test_launches();
  if (!kThreadSanitizer) test_order();
  return natrpb::test::finish("test_emulator");
}
