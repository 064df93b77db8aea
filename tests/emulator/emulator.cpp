#include "emulator.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "state.h"

uint3 threadIdx{0, 0, 0};
uint3 blockIdx{0, 0, 0};
dim3 blockDim;
dim3 gridDim;

namespace natrpb::emulator {

Block block;
Thread* current = nullptr;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int64_t kSharedLimit = 227 * 1024;
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridYZ = 65535;
// Under ThreadSanitizer the blocks of a launch have their shared memory side by side, up to this many bytes in all, so that
// nothing orders one block before another. Beyond it they share one allocation, one block after the other.
constexpr int64_t kSharedOfAllBlocks = 256 << 20;
constexpr int64_t kSharedAlignment = 128;

struct Kernel {
  const void* function;
  int64_t launches = 0;
  int64_t blocks = 0;
  Wavefronts wavefronts;
};

std::mutex launch_mutex;
std::deque<Kernel> kernels;
std::vector<std::unique_ptr<Thread>> pool;  // grows to the largest block
Fiber* launcher = nullptr;
void* body_data = nullptr;
void (*body)(void*) = nullptr;

uint32_t lane_bit(const Thread& thread) { return 1u << thread.lane; }

std::string lanes_text(uint32_t lanes) {
  std::string text;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    int last = lane;
    while (last + 1 < kWarpSize && (lanes >> (last + 1) & 1)) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(lane) + (last > lane ? "-" + std::to_string(last) : "");
    lane = last;
  }
  return text.empty() ? "none" : text;
}

std::string site_text(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string wait_text(const Wait& wait) {
  char mask[32];
  std::snprintf(mask, sizeof mask, " with mask 0x%08x", wait.mask);
  return (wait.collective ? wait.collective->name + std::string(mask) : std::string("__syncthreads")) + " at " +
         site_text(wait.site);
}

std::string lane_state(const Warp& warp, int lane) {
  const uint32_t bit = 1u << lane;
  if (!warp.threads[lane]) return "beyond the block";
  if (warp.exited & bit) return "exited";
  const Wait& wait = warp.threads[lane]->wait;
  if ((warp.waiting | warp.at_barrier) & bit) return "in " + wait_text(wait);
  const std::string state = warp.threads[lane] == current ? "running" : "able to run";
  return state + (wait.site.file ? ", last in " + wait_text(wait) : ", at no collective or barrier so far");
}

std::string waits_text() {
  std::string text;
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const Warp& warp = block.warps[w];
    uint32_t seen = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (seen >> lane & 1) continue;
      const std::string state = lane_state(warp, lane);
      uint32_t same = 0;
      for (int other = lane; other < kWarpSize; ++other) {
        if (lane_state(warp, other) == state) same |= 1u << other;
      }
      seen |= same;
      text += "  warp " + std::to_string(w) + ", lanes " + lanes_text(same) + ": " + state + "\n";
    }
  }
  return text;
}

[[noreturn]] void fail_at_collective(const Wait& wait, const std::string& problem) {
  fail(std::string(wait.collective->name) + ": " + problem, wait.site);
}

bool same_wait(const Wait& a, const Wait& b) {
  return a.collective == b.collective && a.mask == b.mask && same_site(a.site, b.site);
}

// Which of the lanes in `set` goes next.
int next_lane(uint32_t set) { return block.reverse ? 31 - __builtin_clz(set) : __builtin_ctz(set); }

Thread* next_runnable() {
  Warp* const first = block.warps.data();
  Warp* const last = first + block.warps.size() - 1;
  Warp* warp = current->warp;
  for (size_t step = 0; step < block.warps.size(); ++step) {
    if (warp->runnable) return warp->threads[next_lane(warp->runnable)];
    warp = block.reverse ? (warp == first ? last : warp - 1) : (warp == last ? first : warp + 1);
  }
  return nullptr;
}

void enter(Thread& thread) {
  thread.warp->runnable &= ~lane_bit(thread);
  current = &thread;
  threadIdx = thread.index;
}

// Leaves the current thread, which stands in a set other than `runnable`.
void run_others() {
  Fiber& from = current->fiber;
  Thread* next = next_runnable();
  if (next) {
    enter(*next);
    Fiber::switch_from_to(from, next->fiber);
  } else if (block.exited == block.shape.threads) {
    current = nullptr;
    Fiber::switch_from_to(from, *launcher);
  } else {
    current = nullptr;
    fail("deadlock: no thread can run", {nullptr, 0});
  }
}

void order_memory(uint32_t lanes, Warp& warp) {
  if constexpr (kThreadSanitizer) {
    Fiber* group[kWarpSize];
    int count = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes >> lane & 1) group[count++] = &warp.threads[lane]->fiber;
    }
    Fiber::synchronize(group, count, group[0], current->fiber);
  }
}

void release_barrier() {
  std::vector<Fiber*> group;
  for (Warp& warp : block.warps) {
    for (int lane = 0; kThreadSanitizer && lane < kWarpSize; ++lane) {
      if (warp.at_barrier >> lane & 1) group.push_back(&warp.threads[lane]->fiber);
    }
    warp.runnable |= warp.at_barrier;
    warp.at_barrier = 0;
  }
  block.arrived = 0;
  Fiber::synchronize(group.data(), static_cast<int>(group.size()), &block, current->fiber);
}

bool barrier_complete() { return block.arrived > 0 && block.arrived + block.exited == block.shape.threads; }

// A lane that waits for the current thread in a collective would wait for ever once that goes to `place`.
void check_not_awaited(const char* place, Site site) {
  const Warp& warp = *current->warp;
  for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
    const Wait& wait = warp.threads[__builtin_ctz(rest)]->wait;
    if (!(wait.mask & lane_bit(*current))) continue;
    fail("divergence: lane " + std::to_string(current->lane) + " " + place + " while lane " +
             std::to_string(__builtin_ctz(rest)) + " waits for it in " + wait_text(wait),
         site);
  }
}

// Whether all other lanes of the mask wait where `self` arrives now. Lanes that wait for each other at different places are an
// error; one that does not wait for `self` may still come here.
bool arrives_last(const Warp& warp, const Thread& self) {
  const uint32_t others = self.wait.mask & ~lane_bit(self);
  bool complete = (warp.waiting & others) == others;
  for (uint32_t rest = warp.waiting & others; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const Wait& other = warp.threads[lane]->wait;
    if (same_wait(other, self.wait)) continue;
    if (other.mask & lane_bit(self)) {
      fail_at_collective(self.wait, "divergence: lane " + std::to_string(lane) + " waits for this lane in " + wait_text(other));
    }
    complete = false;
  }
  return complete;
}

void thread_exits() {
  check_not_awaited("exits", {nullptr, 0});
  current->warp->exited |= lane_bit(*current);
  ++block.exited;
  if (barrier_complete()) release_barrier();
  run_others();
}

// Fibers live on from block to block, each running one thread of each.
void fiber_main() {
  Fiber::started();
  for (;;) {
    body(body_data);
    thread_exits();
  }
}

void start_block(const LaunchShape& shape, int64_t block_index) {
  block.arrived = block.exited = 0;
  block.unfinished_copies.assign(shape.shared_bytes / 16, 0);
  // ThreadSanitizer sees no races within a fiber: let equal threads of different blocks be different fibers.
  const int64_t rotation = kThreadSanitizer ? block_index * 33 : 0;
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.waiting = warp.at_barrier = warp.group = 0;
    const int lanes = shape.threads - static_cast<int>(w) * kWarpSize;
    warp.runnable = lanes >= kWarpSize ? kFullMask : (1u << lanes) - 1;
    warp.exited = ~warp.runnable;
    for (int lane = 0; lane < kWarpSize && lane < lanes; ++lane) {
      const int64_t index = static_cast<int64_t>(w) * kWarpSize + lane;
      Thread& thread = *pool[(index + rotation) % shape.threads];
      warp.threads[lane] = &thread;
      thread.warp = &warp;
      thread.index = {static_cast<unsigned>(index), 0, 0};
      thread.lane = lane;
      thread.wait = {};
      thread.copies.clear();
      thread.first_copy = 0;
      thread.groups_committed = 0;
      if constexpr (kThreadSanitizer) {
        char name[96];
        std::snprintf(name, sizeof name, "block (%u, %u, %u) thread %u", blockIdx.x, blockIdx.y, blockIdx.z, thread.index.x);
        thread.fiber.set_name(name);
      }
    }
  }
}

void prepare(const LaunchShape& shape) {
  const int warps = (shape.threads + kWarpSize - 1) / kWarpSize;
  block.shape = shape;
  const char* order = std::getenv("NATRPB_EMULATOR_ORDER");
  block.reverse = order && std::string(order) == "reverse";
  block.warps.assign(warps, Warp{});
  while (static_cast<int>(pool.size()) < shape.threads) {
    pool.push_back(std::make_unique<Thread>(fiber_main, static_cast<int>(pool.size())));
  }
  blockDim = dim3(shape.threads);
  gridDim = shape.grid;
}

void synchronize_with_launcher(int threads) {
  if constexpr (kThreadSanitizer) {
    std::vector<Fiber*> group{launcher};
    for (int t = 0; t < threads; ++t) group.push_back(&pool[t]->fiber);
    Fiber::synchronize(group.data(), static_cast<int>(group.size()), &pool, *launcher);
  }
}

void run_grid(const LaunchShape& shape) {
  const int64_t blocks = int64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  const int64_t stride = (shape.shared_bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  const bool side_by_side = kThreadSanitizer && blocks * stride <= kSharedOfAllBlocks;
  const int64_t bytes = side_by_side ? (blocks - 1) * stride + shape.shared_bytes : shape.shared_bytes;
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlignment, static_cast<size_t>(bytes)) != 0) {
    fail("no memory for " + std::to_string(bytes) + " bytes of shared memory", {nullptr, 0});
  }
  std::memset(memory, 0xff, static_cast<size_t>(bytes));
  synchronize_with_launcher(shape.threads);
  for (int64_t step = 0; step < blocks; ++step) {
    const int64_t index = block.reverse ? blocks - 1 - step : step;
    blockIdx = {static_cast<unsigned>(index % shape.grid.x), static_cast<unsigned>(index / shape.grid.x % shape.grid.y),
                static_cast<unsigned>(index / shape.grid.x / shape.grid.y)};
    block.shared = static_cast<unsigned char*>(memory) + (side_by_side ? index * stride : 0);
    if (!side_by_side && step > 0) {
      synchronize_with_launcher(shape.threads);
      std::memset(memory, 0xff, static_cast<size_t>(bytes));
      synchronize_with_launcher(shape.threads);
    }
    start_block(shape, index);
    Warp& first = block.reverse ? block.warps.back() : block.warps.front();
    enter(*first.threads[next_lane(first.runnable)]);
    Fiber::switch_from_to(*launcher, current->fiber);
    finish_shared_loads();
  }
  synchronize_with_launcher(shape.threads);
  std::free(memory);
}

}  // namespace

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

void fail(const std::string& problem, Site site) {
  std::string text = "natrpb emulator: " + problem + "\n";
  if (site.file) text += "  at " + site_text(site) + "\n";
  char place[160];
  std::snprintf(place, sizeof place, "  block (%u, %u, %u) of (%u, %u, %u), %d threads, %lld bytes of shared memory\n",
                blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, gridDim.y, gridDim.z, block.shape.threads,
                static_cast<long long>(block.shape.shared_bytes));
  text += "  kernel " + function_name(block.shape.kernel) + "\n" + place;
  if (current) {
    const int thread = static_cast<int>(current->index.x);
    text += "  thread " + std::to_string(thread) + ": warp " + std::to_string(thread / kWarpSize) + ", lane " +
            std::to_string(current->lane) + "\n";
  }
  std::fflush(stdout);
  std::fputs((text + waits_text()).c_str(), stderr);
  std::abort();
}

void* block_shared_memory() { return block.shared; }

int64_t shared_memory_limit() {
  const char* limit = std::getenv("NATRPB_EMULATOR_SHARED");
  return limit ? std::atoll(limit) : kSharedLimit;
}

int32_t multiprocessors() {
  const char* count = std::getenv("NATRPB_EMULATOR_MULTIPROCESSORS");
  return count ? std::atoi(count) : 1;
}

void fail_shuffle(const Collective& collective, const char* what, int64_t value, Site site) {
  fail(std::string(collective.name) + ": " + what + ": " + std::to_string(value), site);
}

void check_aligned(const void* address, int bytes, const char* operation, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  char text[160];
  std::snprintf(text, sizeof text, "%s: address %p is not %d-byte aligned", operation, address, bytes);
  fail(text, site);
}

void check_shared(const void* address, int bytes, const char* operation, Site site) {
  const int64_t offset = static_cast<const unsigned char*>(address) - block.shared;
  if (offset < 0 || offset + bytes > block.shape.shared_bytes) {
    fail(std::string(operation) + ": bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) +
             " are not in the block's shared memory",
         site);
  }
  check_aligned(address, bytes, operation, site);
}

void check_readable(const void* address, int bytes, const char* operation, Site site) {
  check_shared(address, bytes, operation, site);
  if (block.copies_to(address) == 0) return;
  std::string threads;
  for (const Warp& warp : block.warps) {
    for (const Thread* thread : warp.threads) {
      for (size_t i = thread ? thread->first_copy : 0; thread && i < thread->copies.size(); ++i) {
        if (thread->copies[i].shared == address) threads += " " + std::to_string(thread->index.x);
      }
    }
  }
  fail(std::string(operation) + ": reads what a cp.async still writes, which was not waited for by thread" + threads, site);
}

void rendezvous(const Collective& collective, uint32_t mask, void* operands, Site site) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  const uint32_t bit = lane_bit(self);
  self.wait = {&collective, mask, site};
  warp.operands[self.lane] = operands;
  if (!(mask & bit)) fail_at_collective(self.wait, "divergence: the calling lane is missing from the mask");
  if (const uint32_t gone = mask & (warp.exited | warp.at_barrier)) {
    fail_at_collective(self.wait,
                       "divergence: lanes " + lanes_text(gone) + " of the mask exited, do not exist or are in __syncthreads");
  }
  if (warp.group == 0) warp.group_wait = self.wait;
  const bool joined = warp.group == 0 || same_wait(warp.group_wait, self.wait);
  if (joined) warp.group |= bit;
  const bool complete = joined && !(warp.waiting & mask & ~warp.group) ? warp.group == mask : arrives_last(warp, self);
  if (!complete) {
    warp.waiting |= bit;
    run_others();
    return;
  }
  if (collective.run) collective.run(warp.operands, mask);
  if (collective.orders_memory) order_memory(mask, warp);
  warp.group &= ~mask;
  warp.waiting &= ~mask;
  warp.runnable |= mask & ~bit;
}

void block_barrier(Site site) {
  current->wait = {nullptr, 0, site};
  check_not_awaited("enters __syncthreads", site);
  if (block.arrived == 0) block.barrier_site = site;
  if (!same_site(block.barrier_site, site)) {
    fail("__syncthreads: divergence: other threads are in __syncthreads at " + site_text(block.barrier_site), site);
  }
  Warp& warp = *current->warp;
  warp.at_barrier |= lane_bit(*current);
  ++block.arrived;
  if (!barrier_complete()) return run_others();
  release_barrier();
  warp.runnable &= ~lane_bit(*current);
}

Status launch(const LaunchShape& shape, void* data, void (*call)(void* body)) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return {};
  if (shape.threads < 1 || shape.threads > kMaxThreads || shape.shared_bytes < 0 ||
      shape.shared_bytes > shared_memory_limit() || shape.grid.x > kMaxGridX || shape.grid.y > kMaxGridYZ ||
      shape.grid.z > kMaxGridYZ) {
    return Status::error("launching " + function_name(shape.kernel) + " with a grid of " + std::to_string(shape.grid.x) +
                         " x " + std::to_string(shape.grid.y) + " x " + std::to_string(shape.grid.z) + " blocks, " +
                         std::to_string(shape.threads) + " threads and " + std::to_string(shape.shared_bytes) +
                         " bytes of shared memory each failed: beyond the limits of the emulated device");
  }
  const std::lock_guard<std::mutex> lock(launch_mutex);
  Kernel* kernel = nullptr;
  for (Kernel& known : kernels) {
    if (known.function == shape.kernel) kernel = &known;
  }
  if (!kernel) kernel = &kernels.emplace_back(Kernel{shape.kernel, 0, 0, {}});
  ++kernel->launches;
  kernel->blocks += int64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  block.wavefronts = &kernel->wavefronts;
  body = call;
  body_data = data;
  Fiber here;
  launcher = &here;
  prepare(shape);
  run_grid(shape);
  launcher = nullptr;
  return {};
}

std::vector<Counters> counters() {
  std::vector<Counters> all;
  for (const Kernel& kernel : kernels) {
    if (kernel.launches == 0) continue;
    all.push_back({function_name(kernel.function), kernel.launches, kernel.blocks, kernel.wavefronts.ldmatrix,
                   kernel.wavefronts.ldmatrix_conflicts, kernel.wavefronts.load, kernel.wavefronts.load_conflicts});
  }
  return all;
}

void reset_counters() { kernels.clear(); }

}  // namespace natrpb::emulator
