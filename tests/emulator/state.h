// The block that runs now, shared by the emulator's own sources. One launch runs at a time, so all of it is global.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace natrpb::emulator {

// Why a thread stopped, or stopped last: at a collective, or at __syncthreads (collective == nullptr).
struct Wait {
  const Collective* collective = nullptr;
  uint32_t mask = 0;
  Site site{nullptr, 0};
};

struct PendingCopy {
  void* shared;
  uint4 value;
  int64_t group;
};

struct Warp;

struct Thread {
  explicit Thread(void (*entry)(), int number) : fiber(entry, number) {}

  Fiber fiber;
  Warp* warp = nullptr;
  uint3 index{0, 0, 0};
  int lane = 0;
  Wait wait;
  std::vector<PendingCopy> copies;  // from `first_copy` on, oldest first
  size_t first_copy = 0;
  int64_t groups_committed = 0;
};

// The lanes' addresses of one 16-byte shared load of a warp.
struct SharedLoad {
  uint32_t lanes = 0;
  const void* address[kWarpSize];
};

// The loads at one line of source that not all lanes have reached yet; lane l's next one is loads[next[l]].
struct SharedLoadLog {
  Site site{nullptr, 0};
  std::deque<SharedLoad> loads;
  int64_t next[kWarpSize] = {};
};

// Every existing lane is in exactly one of the four sets, except the running one, which is in none.
struct Warp {
  Thread* threads[kWarpSize] = {};  // nullptr beyond the block
  uint32_t runnable = 0;
  uint32_t waiting = 0;     // at a collective
  uint32_t at_barrier = 0;  // at __syncthreads
  uint32_t exited = 0;      // or beyond the block
  void* operands[kWarpSize] = {};
  // Some of the waiting lanes, all with equal waits: usually the only ones, so that most arrivals need one comparison.
  uint32_t group = 0;
  Wait group_wait;
  std::vector<SharedLoadLog> load_logs;
};

struct Wavefronts {
  int64_t ldmatrix = 0;
  int64_t ldmatrix_conflicts = 0;
  int64_t load = 0;
  int64_t load_conflicts = 0;
};

struct Block {
  LaunchShape shape{};
  std::vector<Warp> warps;
  int arrived = 0;  // threads at __syncthreads
  int exited = 0;
  Site barrier_site{nullptr, 0};
  unsigned char* shared = nullptr;
  std::vector<uint8_t> unfinished_copies;  // to each 16 bytes of shared memory
  bool reverse = false;                    // lanes, warps and blocks from last to first
  Wavefronts* wavefronts = nullptr;

  uint8_t& copies_to(const void* address) {
    return unfinished_copies[(static_cast<const unsigned char*>(address) - shared) / 16];
  }
};

extern Block block;
extern Thread* current;

bool same_site(const Site& a, const Site& b);
void finish_shared_loads();
// The demangled name of the function at `address`, also of one without external linkage.
std::string function_name(const void* address);

}  // namespace natrpb::emulator
