// Storage types of tensors, the types that kernels compute in, and loads and stores between the two.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/ptx.cuh"
#include "natrpb/local_attention.h"

namespace natrpb::cuda {

// fp64 computes in fp64, everything else in fp32.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Tag {
  using Type = T;
};

// f(Tag<T>()) with the storage type T of `dtype`
template <class F>
auto with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(Tag<double>());
    case DType::kBFloat16:
      return f(Tag<__nv_bfloat16>());
    case DType::kFloat16:
      return f(Tag<__half>());
    default:
      return f(Tag<float>());
  }
}

// Elements in the widest load of a thread, 16 bytes.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void round_to(double x, double& to) { to = x; }
__device__ __forceinline__ void round_to(float x, float& to) { to = x; }
__device__ __forceinline__ void round_to(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void round_to(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// V elements from p; V is 1, or kVector<T> with p aligned to 16 bytes.
template <int V, class T>
__device__ __forceinline__ void load(const T* p, Compute<T> (&x)[V]) {
  static_assert(V == 1 || V == kVector<T>);
  T stored[V];
  if constexpr (V == 1) {
    stored[0] = *p;
  } else {
    const uint4 bits = ptx::load_16(p);
    memcpy(static_cast<void*>(stored), &bits, sizeof bits);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = widen(stored[i]);
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, const Compute<T> (&x)[V]) {
  static_assert(V == 1 || V == kVector<T>);
  T stored[V];
#pragma unroll
  for (int i = 0; i < V; ++i) round_to(x[i], stored[i]);
  if constexpr (V == 1) {
    *p = stored[0];
  } else {
    uint4 bits;
    memcpy(&bits, static_cast<const void*>(stored), sizeof bits);
    ptx::store_16(p, bits);
  }
}

}  // namespace natrpb::cuda
