// Runs the CUDA kernels of csrc/cuda on the CPU: their source, compiled by a C++ compiler with NATRPB_EMULATOR, block after
// block on the calling thread. Every CUDA thread is a fiber; a warp-level operation is a rendezvous of the lanes in its mask.
//
// What it models
//   * threads, warps, blocks, grids and their limits; a refused launch returns a Status as on the device;
//   * __syncthreads: threads that have exited count as arrived, as on the device;
//   * warp collectives (shuffles, votes, __syncwarp, ldmatrix, mma) with their masks. Stricter than the device: a mask may name
//     neither exited lanes nor lanes beyond the block, and all must stand at the same line of source, as at __syncthreads;
//   * dynamic shared memory: exactly the requested bytes, filled with 0xff (NaN) for every block, on the heap, so that
//     AddressSanitizer sees overruns;
//   * cp.async: the destination holds NaN from the issue until the thread waits for the copy's group, and neither ldmatrix nor
//     load_shared_16 may read it before;
//   * alignment of 16-byte accesses, ldmatrix and cp.async, and that their shared addresses are shared memory;
//   * fragment layouts of ldmatrix and mma as the PTX ISA states them; mma adds exact products in fp32, k ascending;
//   * bank conflicts of ldmatrix and ptx::load_shared_16, counted per kernel (see counters());
//   * memory order, under ThreadSanitizer: each CUDA thread is a TSan fiber. Only __syncthreads and __syncwarp order memory
//     (CUDA programming guide: shuffles and votes imply no memory barrier), and blocks are unordered within a launch, so that
//     a missing barrier, or two blocks writing one address, shows as a data race.
// A violation ends the process with a message that names kernel, block, warp and lanes, and where every lane waits.
//
// What it cannot show
//   * whether a device lays fragments out as the PTX ISA is read here, rounds mma sums or approximates ex2 the same way;
//   * time, registers, launch bounds, L1/L2 and global memory coalescing;
//   * a spin on memory between collectives: it hangs, since fibers change only at collectives and at barriers;
//   * races between blocks of a launch that needs more shared memory in all than kSharedOfAllBlocks (emulator.cpp), and, under
//     ThreadSanitizer, bank conflicts of load_shared_16.
// Environment variables, read at every launch:
//   NATRPB_EMULATOR_ORDER=reverse  blocks, warps and lanes run from last to first: results must not depend on it;
//   NATRPB_EMULATOR_MULTIPROCESSORS=n  of the device, 1 unless given: small cases then fill blocks of several warps
//   NATRPB_EMULATOR_SHARED=bytes   what a block may ask for: 232448 as on sm_90 and sm_100 unless given, 166912 on sm_80,
//                                  101376 on sm_120.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "natrpb/status.h"

// The CUDA headers define the other function attributes, empty, for a C++ compiler. NB: the C++ library itself writes
// __attribute__((__noinline__)), which stays valid with an empty word.
#define __launch_bounds__(...)
#define __noinline__

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace natrpb::emulator {

inline constexpr int kWarpSize = 32;
inline constexpr uint32_t kFullMask = 0xffffffffu;

// Where a call stands in the kernel's source; taken as a default argument.
struct Site {
  const char* file;
  int line;
};

// What lanes do together: `run` gets the operands of the lanes in `mask`.
struct Collective {
  const char* name;
  void (*run)(void* const (&operands)[kWarpSize], uint32_t mask);
  bool orders_memory = false;
};

// Returns when all lanes of `mask` have arrived here and the collective has run.
void rendezvous(const Collective& collective, uint32_t mask, void* operands, Site site);
void block_barrier(Site site);
void* block_shared_memory();
int64_t shared_memory_limit();
int32_t multiprocessors();
inline int lane_index() { return static_cast<int>(threadIdx.x % kWarpSize); }

// Ends the process with `problem`, the place, and where all lanes of the block wait.
[[noreturn]] void fail(const std::string& problem, Site site);
[[noreturn]] void fail_shuffle(const Collective& collective, const char* what, int64_t value, Site site);
void check_aligned(const void* address, int bytes, const char* operation, Site site);
void check_shared(const void* address, int bytes, const char* operation, Site site);
// Also that no thread's cp.async is still writing there.
void check_readable(const void* address, int bytes, const char* operation, Site site);

struct LaunchShape {
  const void* kernel;
  dim3 grid;
  int threads;
  int64_t shared_bytes;
};
Status launch(const LaunchShape& shape, void* body, void (*call)(void* body));

// Shared-memory wavefronts of a kernel since the last reset. A warp's 16-byte access takes one wavefront per 8 lanes; each
// further one that different addresses in the same banks force is a conflict (equal addresses are broadcast).
struct Counters {
  std::string kernel;
  int64_t launches = 0;
  int64_t blocks = 0;
  int64_t ldmatrix_wavefronts = 0;
  int64_t ldmatrix_conflicts = 0;
  int64_t load_wavefronts = 0;
  int64_t load_conflicts = 0;
};
std::vector<Counters> counters();  // one entry per kernel that ran, in the order of their first launches
void reset_counters();

// shuffle: every lane offers a value and names the lane whose value it takes.
struct Shuffle {
  uint64_t value;
  int source;
};
extern const Collective kShuffle, kShuffleXor, kShuffleDown, kBallot, kAny, kAll, kSyncwarp;

template <class T>
T shuffle(const Collective& collective, uint32_t mask, T value, int source, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  if (width <= 0 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail_shuffle(collective, "a width that is no power of two up to 32", width, site);
  }
  if ((mask >> lane_index() & 1) && !(mask >> source & 1)) {
    fail_shuffle(collective, "a source lane that is not in the mask", source, site);
  }
  Shuffle operands{0, source};
  std::memcpy(&operands.value, &value, sizeof(T));
  rendezvous(collective, mask, &operands, site);
  std::memcpy(&value, &operands.value, sizeof(T));
  return value;
}

inline uint32_t vote(const Collective& collective, uint32_t mask, bool predicate, Site site) {
  uint32_t operand = predicate;
  rendezvous(collective, mask, &operand, site);
  return operand;
}

}  // namespace natrpb::emulator

inline void __syncthreads(natrpb::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  natrpb::emulator::block_barrier(site);
}

inline void __syncwarp(uint32_t mask = natrpb::emulator::kFullMask,
                       natrpb::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  natrpb::emulator::rendezvous(natrpb::emulator::kSyncwarp, mask, nullptr, site);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = natrpb::emulator::kWarpSize,
              natrpb::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  namespace emulator = natrpb::emulator;
  if (source < 0 || source >= width) {
    emulator::fail_shuffle(emulator::kShuffle, "a source lane out of range", source, site);
  }
  const int segment = emulator::lane_index() & ~(width - 1);
  return emulator::shuffle(emulator::kShuffle, mask, value, segment + source, width, site);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = natrpb::emulator::kWarpSize,
                  natrpb::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  namespace emulator = natrpb::emulator;
  if (lane_mask < 0 || lane_mask >= width) {
    emulator::fail_shuffle(emulator::kShuffleXor, "a lane mask out of range", lane_mask, site);
  }
  return emulator::shuffle(emulator::kShuffleXor, mask, value, emulator::lane_index() ^ lane_mask, width, site);
}

// The last `delta` lanes of a segment keep their own value, as on the device.
template <class T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t delta, int width = natrpb::emulator::kWarpSize,
                   natrpb::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  namespace emulator = natrpb::emulator;
  const int lane = emulator::lane_index();
  const int64_t source = int64_t{lane} + delta;
  const bool inside = source <= (lane | (width - 1));
  return emulator::shuffle(emulator::kShuffleDown, mask, value, inside ? static_cast<int>(source) : lane, width, site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              natrpb::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  return natrpb::emulator::vote(natrpb::emulator::kBallot, mask, predicate != 0, site);
}

inline int __any_sync(uint32_t mask, int predicate, natrpb::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  return natrpb::emulator::vote(natrpb::emulator::kAny, mask, predicate != 0, site) != 0;
}

inline int __all_sync(uint32_t mask, int predicate, natrpb::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  return natrpb::emulator::vote(natrpb::emulator::kAll, mask, predicate != 0, site) != 0;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

namespace natrpb::cuda {

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulator::block_shared_memory());
}

struct DeviceLimits {
  int64_t block_shared_bytes, multiprocessor_shared_bytes;
  int32_t multiprocessors;
};
// A multiprocessor has 1 KiB more than its largest block may ask for, on every architecture from sm_80 to sm_120.
inline DeviceLimits device_limits() {
  const int64_t block = emulator::shared_memory_limit();
  return {block, block + 1024, emulator::multiprocessors()};
}

template <class... P>
Status launch(void (*kernel)(P...), dim3 grid, int threads, int64_t shared_bytes, void* /*stream*/, const P&... params) {
  auto body = [&] { kernel(params...); };
  return emulator::launch({reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes}, &body,
                          [](void* call) { (*static_cast<decltype(body)*>(call))(); });
}

}  // namespace natrpb::cuda
