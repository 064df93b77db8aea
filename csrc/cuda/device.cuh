// What every kernel file starts from: the CUDA built-ins, the block's dynamic shared memory and the one way to launch.
//
// nvcc takes the built-ins from the CUDA runtime. With NATRPB_EMULATOR a C++ compiler takes them from tests/emulator, which
// runs the same source on the CPU. `extern __shared__` and launch brackets do not parse there: hence shared_memory(), launch().
#pragma once

#ifdef NATRPB_EMULATOR
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "natrpb/status.h"

namespace natrpb::cuda {

// The dynamic shared memory of this thread's block, 128-byte aligned; its contents are undefined when a block starts.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char block_shared_memory[];
  return reinterpret_cast<T*>(block_shared_memory);
}

// What the current device offers.
struct DeviceLimits {
  int64_t block_shared_bytes, multiprocessor_shared_bytes;
  int32_t multiprocessors;
};
inline DeviceLimits device_limits() {
  int device = 0, block = 0, multiprocessor = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return {block, multiprocessor, count};
}

// Queues kernel(params...) on `stream` (a cudaStream_t of the current device) for grid.x * grid.y * grid.z blocks of `threads`
// threads and `shared_bytes` bytes of dynamic shared memory each. A grid with a zero extent launches nothing.
template <class... P>
Status launch(void (*kernel)(P...), dim3 grid, int threads, int64_t shared_bytes, void* stream, const P&... params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  constexpr int64_t kDefaultSharedLimit = 48 * 1024;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultSharedLimit) {
    // NB: always the same limit. All threads share it, and one that lowered it would break another's launch.
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(device_limits().block_shared_bytes));
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))...};
    error = cudaLaunchKernel(function, grid, dim3(threads), arguments, static_cast<size_t>(shared_bytes),
                             static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // a refused launch must not be reported again by whoever asks next
  const char* name = nullptr;
  if (cudaFuncGetName(&name, function) != cudaSuccess) {
    cudaGetLastError();
    name = "a kernel";
  }
  return Status::error("launching " + std::string(name) + " with a grid of " + std::to_string(grid.x) + " x " +
                       std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks, " + std::to_string(threads) +
                       " threads and " + std::to_string(shared_bytes) +
                       " bytes of shared memory each failed: " + cudaGetErrorString(error));
}

}  // namespace natrpb::cuda

#endif  // NATRPB_EMULATOR
