// One function per PTX instruction that CUDA C++ has no words for; no other file holds inline assembly. With NATRPB_EMULATOR
// the same functions come from tests/emulator. Fragment layouts of ldmatrix and mma: PTX ISA, "Warp-level matrix
// instructions"; with g = lane / 4 and t = lane % 4 a register holds two neighbors, the lower column in the lower half:
//
//   A 16x16  a[0] row g    columns 2t, 2t+1     a[1] row g+8  same columns     a[2], a[3] the same rows, columns + 8
//   B 16x8   b[0] rows 2t, 2t+1 of column g     b[1] rows + 8
//   C 16x8   c[0], c[1] row g, columns 2t, 2t+1   c[2], c[3] row g+8
//
// "memory" is clobbered wherever the compiler must not move a load or a store of shared or global memory past the instruction.
#pragma once

#include "cuda/device.cuh"

#ifdef NATRPB_EMULATOR
#include "emulator_ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace natrpb::cuda::ptx {

// 2^x; about 2 ulp; a subnormal argument counts as 0 and a subnormal result becomes 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); a subnormal argument counts as 0.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x; about 1 ulp; subnormal arguments and results count as 0.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts copying 16 bytes to shared memory, past L1; both addresses 16-byte aligned. Where !valid zeros are written and
// `global` is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of this thread's copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N latest groups of this thread are unfinished. Other threads need a barrier on top.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Loads 8x8 matrices of 16-bit elements from shared memory, register i from matrix i. Lane 8 i + j gives the 16-byte aligned
// address of row j of matrix i; lane l gets columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 (of the transpose in _trans).
// All 32 lanes call it together.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// Two matrices; the addresses of lanes 16 to 31 are ignored.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// c += a b of a 16x16 and a 16x8 matrix of T (__half or __nv_bfloat16), summed in fp32. All 32 lanes call it together.
template <class T>
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Two floats rounded to nearest-even to T and packed, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The inverse of pack: x from the lower half, y from the upper.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(__halves2half2(__ushort_as_half(static_cast<unsigned short>(packed)),
                                         __ushort_as_half(static_cast<unsigned short>(packed >> 16))));
  } else {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
  }
}

// 16 aligned bytes of global memory that nothing writes while the kernel runs.
__device__ __forceinline__ uint4 load_16(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(global)));
  return v;
}

// 8 bytes, likewise.
__device__ __forceinline__ uint2 load_8(const void* global) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(__cvta_generic_to_global(global)));
  return v;
}

// 4 bytes, likewise; 0 where !valid, and then `global` is not read.
__device__ __forceinline__ uint32_t load_4(const void* global, bool valid = true) {
  uint32_t v;
  asm volatile(
      "{\n"
      ".reg .pred valid;\n"
      "setp.ne.u32 valid, %2, 0;\n"
      "mov.u32 %0, 0;\n"
      "@valid ld.global.nc.u32 %0, [%1];\n"
      "}"
      : "=&r"(v)
      : "l"(__cvta_generic_to_global(global)), "r"(static_cast<uint32_t>(valid)));
  return v;
}

// load_16 as four floats.
__device__ __forceinline__ float4 load_f4(const void* global) {
  float4 v;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(__cvta_generic_to_global(global)));
  return v;
}

// 16 aligned bytes of shared memory in one instruction. Plain C++, which the compiler may schedule freely between barriers; a
// function only so that the emulator can count bank conflicts.
__device__ __forceinline__ uint4 load_shared_16(const void* shared) { return *static_cast<const uint4*>(shared); }

// NB: written as *(uint4*)p = v, nvcc may split a store into four.
__device__ __forceinline__ void store_16(void* global, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_8(void* global, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(global)), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_4(void* global, uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(v) : "memory");
}

}  // namespace natrpb::cuda::ptx

#endif  // NATRPB_EMULATOR
