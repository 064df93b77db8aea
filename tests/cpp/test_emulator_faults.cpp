// What the emulator must refuse: wrong collectives, and races and overruns in sanitized builds. Each fault runs in a process of
// its own, which must end with the message that the fault deserves.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"

namespace {

using natrpb::cuda::launch;
using natrpb::cuda::shared_memory;
using natrpb::test::check;
namespace ptx = natrpb::cuda::ptx;

constexpr uint32_t kFull = 0xffffffffu;

__global__ void lane_at_other_collective(float* out) {
  float value = 1.0f;
  if (threadIdx.x == 40) {
    value = static_cast<float>(__ballot_sync(kFull, 1));
  } else {
    value = __shfl_sync(kFull, value, 0);
  }
  out[threadIdx.x] = value;
}

__global__ void lane_not_in_its_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }

__global__ void lane_exited_before_collective(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kFull, 1.0f, 1);
}

__global__ void lane_at_barrier_instead_of_collective(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kFull, 1.0f, 1);
}

__global__ void shuffle_out_of_range(float* out) { out[threadIdx.x] = __shfl_sync(kFull, 1.0f, 32); }

// Lane 0 waits for 1, 1 for 2 and 2 for 0.
__global__ void lanes_in_a_circle(float* out) {
  const int lane = threadIdx.x;
  if (lane < 3) __syncwarp(1u << lane | 1u << (lane + 1) % 3);
  out[lane] = 0.0f;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0.0f;
}

__global__ void misaligned_copy(float* out) { ptx::cp_async_16(shared_memory<float>() + 1, out, true); }

__global__ void ldmatrix_of_global(float* out) {
  uint32_t registers[4];
  ptx::ldmatrix_x4(registers, out);
}

__global__ void ldmatrix_without_wait(float* out) {
  uint32_t registers[4];
  float* memory = shared_memory<float>();
  ptx::cp_async_16(memory + 4 * threadIdx.x, out, true);
  ptx::cp_async_commit();
  if (threadIdx.x != 3) ptx::cp_async_wait<0>();
  __syncthreads();
  ptx::ldmatrix_x4(registers, memory + threadIdx.x % 32 * 4);
}

__global__ void write_beyond_shared(float* out) { shared_memory<float>()[threadIdx.x + 1] = out[0]; }

__global__ void read_without_barrier(float* out) {
  float* memory = shared_memory<float>();
  memory[threadIdx.x] = 1.0f;
  out[threadIdx.x] = memory[63 - threadIdx.x];
}

__global__ void shuffle_is_no_barrier(float* out) {
  float* memory = shared_memory<float>();
  memory[threadIdx.x] = 1.0f;
  const float value = __shfl_xor_sync(kFull, 1.0f, 1);
  out[threadIdx.x] = value + memory[threadIdx.x ^ 1];
}

__global__ void barrier_of_one_warp_only(float* out) {
  float* memory = shared_memory<float>();
  memory[threadIdx.x] = 1.0f;
  __syncwarp();
  out[threadIdx.x] = memory[63 - threadIdx.x];
}

__global__ void ldmatrix_without_barrier(float* out) {
  uint32_t registers[4];
  uint4* memory = shared_memory<uint4>();
  memory[threadIdx.x ^ 1] = {0, 0, 0, 0};
  ptx::ldmatrix_x4(registers, memory + threadIdx.x % 32);
  out[threadIdx.x] = static_cast<float>(registers[0]);
}

__global__ void stage_overwritten_early(float* out) {
  float* memory = shared_memory<float>();
  ptx::cp_async_16(memory + 4 * threadIdx.x, out, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[4 + threadIdx.x] = memory[4 * (63 - threadIdx.x)];
  ptx::cp_async_16(memory + 4 * threadIdx.x, out, true);
}

__global__ void blocks_share_an_output(float* out) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }

struct Fault {
  const char* name;
  void (*kernel)(float*);
  int blocks;
  const char* sanitizer;  // which finds it; "" where every build does
  std::vector<const char*> message;
};

const Fault kFaults[] = {
    {"other_collective",
     lane_at_other_collective,
     1,
     "",
     {"divergence", "lane_at_other_collective", "block (0, 0, 0)", "warp 1, lanes 8:", "__ballot_sync", "__shfl_sync",
      "test_emulator_faults.cpp:"}},
    {"not_in_mask", lane_not_in_its_mask, 1, "", {"divergence", "lane is missing from the mask", "thread 16: warp 0, lane 16"}},
    {"exited", lane_exited_before_collective, 1, "", {"divergence", "lane 5 ", "exits", "waits for it in __shfl_xor_sync"}},
    {"barrier_for_collective", lane_at_barrier_instead_of_collective, 1, "", {"divergence", "__syncthreads", "lanes 0-15"}},
    {"out_of_range", shuffle_out_of_range, 1, "", {"__shfl_sync: a source lane out of range: 32"}},
    {"circle", lanes_in_a_circle, 1, "", {"deadlock", "lanes 0: in __syncwarp with mask 0x00000003", "lanes 3-31: exited"}},
    {"two_barriers", two_barriers, 1, "", {"divergence", "other threads are in __syncthreads at"}},
    {"misaligned", misaligned_copy, 1, "", {"cp_async_16", "not 16-byte aligned"}},
    {"global_ldmatrix", ldmatrix_of_global, 1, "", {"ldmatrix_x4", "not in the block's shared memory"}},
    {"no_wait", ldmatrix_without_wait, 1, "", {"ldmatrix_x4", "not waited for by thread 3\n", "thread 35: warp 1, lane 3"}},
    {"overrun", write_beyond_shared, 1, "address", {"AddressSanitizer: heap-buffer-overflow", "write_beyond_shared"}},
    {"no_barrier", read_without_barrier, 1, "thread", {"data race", "read_without_barrier"}},
    {"shuffle_barrier", shuffle_is_no_barrier, 1, "thread", {"data race", "shuffle_is_no_barrier"}},
    {"warp_barrier", barrier_of_one_warp_only, 1, "thread", {"data race", "barrier_of_one_warp_only"}},
    {"ldmatrix_barrier", ldmatrix_without_barrier, 1, "thread", {"data race", "ldmatrix_without_barrier"}},
    {"early_overwrite", stage_overwritten_early, 1, "thread", {"data race", "stage_overwritten_early"}},
    {"blocks", blocks_share_an_output, 2, "thread", {"data race", "blocks_share_an_output", "block (1, 0, 0)"}},
};

const char* sanitizer() {
#if defined(__SANITIZE_THREAD__)
  return "thread";
#elif defined(__SANITIZE_ADDRESS__)
  return "address";
#else
  return "";
#endif
}

constexpr int kFaultThreads = 64;
constexpr int64_t kFaultShared = kFaultThreads * 16;

int run_fault(const std::string& name) {
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  for (const Fault& fault : kFaults) {
    if (name != fault.name) continue;
    std::vector<float> out(4 + kFaultThreads);
    const bool overrun = fault.kernel == write_beyond_shared;
    return !launch(fault.kernel, dim3(fault.blocks), kFaultThreads, overrun ? kFaultThreads * 4 : kFaultShared, nullptr,
                   out.data())
                .ok();
  }
  return 0;
}

void test_faults(const char* program) {
  for (const Fault& fault : kFaults) {
    if (*fault.sanitizer && std::string(fault.sanitizer) != sanitizer()) continue;
    int ends[2];
    check(pipe(ends) == 0, [] { return "pipe"; });
    const pid_t child = fork();
    if (child == 0) {
      dup2(ends[1], STDERR_FILENO);
      close(ends[0]);
      execl("/proc/self/exe", program, fault.name, static_cast<char*>(nullptr));
      _exit(0);
    }
    close(ends[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<size_t>(got));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    check(status != 0, [&] { return std::string("fault ") + fault.name + " went unseen"; });
    for (const char* part : fault.message) {
      check(text.find(part) != std::string::npos,
            [&] { return std::string("fault ") + fault.name + " does not say '" + part + "' but:\n" + text; });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return run_fault(argv[1]);
  test_faults(argv[0]);
  return natrpb::test::finish("test_emulator_faults");
}
