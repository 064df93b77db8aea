// Host twins of csrc/cuda/ptx.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

namespace natrpb::emulator {

// Operands of one lane.
struct Ldmatrix {
  const void* address;
  uint16_t row[8];
  uint32_t result[4];
};
struct Mma {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};
extern const Collective kLdmatrixX4, kLdmatrixX4Trans, kLdmatrixX2, kMmaHalf, kMmaBfloat16;

// Each lane reads the row that it names, so that a data race is reported for the lane that gave the address.
template <int N>
void ldmatrix(const Collective& collective, uint32_t (&r)[N], const void* shared_row, Site site) {
  Ldmatrix operands{shared_row, {}, {}};
  if (lane_index() < 8 * N) {
    check_readable(shared_row, 16, collective.name, site);
    const uint16_t* row = static_cast<const uint16_t*>(shared_row);
    for (int i = 0; i < 8; ++i) operands.row[i] = row[i];
  }
  rendezvous(collective, kFullMask, &operands, site);
  for (int i = 0; i < N; ++i) r[i] = operands.result[i];
}

// cp.async of the calling thread.
void copy_started(void* shared, uint4 value);
void copies_committed();
// The oldest copy that is not among the `pending` latest groups; false where there is none.
bool copy_finished(int pending, void*& shared, uint4& value);

void count_shared_load(const void* address, Site site);

inline float flush_subnormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

}  // namespace natrpb::emulator

namespace natrpb::cuda::ptx {

using emulator::Site;

inline float exp2_approx(float x) { return emulator::flush_subnormal(std::exp2(emulator::flush_subnormal(x))); }
inline float log2_approx(float x) { return std::log2(emulator::flush_subnormal(x)); }
inline float rcp_approx(float x) { return emulator::flush_subnormal(1.0f / emulator::flush_subnormal(x)); }

inline void cp_async_16(void* shared, const void* global, bool valid, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::check_shared(shared, 16, "cp_async_16", site);
  emulator::check_aligned(global, 16, "cp_async_16", site);
  emulator::copy_started(shared, valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0});
  *static_cast<uint4*>(shared) = {~0u, ~0u, ~0u, ~0u};
}

inline void cp_async_commit() { emulator::copies_committed(); }

template <int N>
void cp_async_wait() {
  void* shared;
  uint4 value;
  while (emulator::copy_finished(N, shared, value)) *static_cast<uint4*>(shared) = value;
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::ldmatrix(emulator::kLdmatrixX4, r, shared_row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::ldmatrix(emulator::kLdmatrixX4Trans, r, shared_row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::ldmatrix(emulator::kLdmatrixX2, r, shared_row, site);
}

template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               Site site = {__builtin_FILE(), __builtin_LINE()}) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  emulator::Mma operands{c, a, b};
  emulator::rendezvous(std::is_same_v<T, __half> ? emulator::kMmaHalf : emulator::kMmaBfloat16, emulator::kFullMask, &operands,
                       site);
}

template <class T>
uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    return __half_as_ushort(__float2half_rn(low)) | static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
  }
}

template <class T>
float2 unpack(uint32_t packed) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    return {__half2float(__ushort_as_half(static_cast<uint16_t>(packed))),
            __half2float(__ushort_as_half(static_cast<uint16_t>(packed >> 16)))};
  } else {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
  }
}

inline uint4 load_16(const void* global, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::check_aligned(global, 16, "load_16", site);
  return *static_cast<const uint4*>(global);
}

inline uint2 load_8(const void* global, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::check_aligned(global, 8, "load_8", site);
  return *static_cast<const uint2*>(global);
}

inline uint32_t load_4(const void* global, bool valid = true, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::check_aligned(global, 4, "load_4", site);
  return valid ? *static_cast<const uint32_t*>(global) : 0;
}

inline float4 load_f4(const void* global, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::check_aligned(global, 16, "load_f4", site);
  return *static_cast<const float4*>(global);
}

inline uint4 load_shared_16(const void* shared, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::check_readable(shared, 16, "load_shared_16", site);
  emulator::count_shared_load(shared, site);
  return *static_cast<const uint4*>(shared);
}

inline void store_16(void* global, uint4 v, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::check_aligned(global, 16, "store_16", site);
  *static_cast<uint4*>(global) = v;
}

inline void store_8(void* global, uint2 v, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::check_aligned(global, 8, "store_8", site);
  *static_cast<uint2*>(global) = v;
}

inline void store_4(void* global, uint32_t v, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::check_aligned(global, 4, "store_4", site);
  *static_cast<uint32_t*>(global) = v;
}

}  // namespace natrpb::cuda::ptx
