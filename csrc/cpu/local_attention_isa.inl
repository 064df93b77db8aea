// Included by the tiny file of each instruction set after it has defined NATRPB_ISA, NATRPB_VECTOR_BYTES and NATRPB_TARGET.
// NB: everything below the pragma is compiled for that target, and nothing there may be shared with other files: an inline
// function of the standard library instantiated here could be the copy that the linker keeps for a machine without the set.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#define NATRPB_X86
#include <immintrin.h>
#endif

#define NATRPB_INLINE inline __attribute__((always_inline))
#define NATRPB_LAMBDA __attribute__((always_inline))
#define NATRPB_PRAGMA(text) _Pragma(#text)

#ifdef NATRPB_TARGET
#ifdef __clang__
#define NATRPB_TARGET_PRAGMA(t) NATRPB_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#else
#define NATRPB_TARGET_PRAGMA(t) NATRPB_PRAGMA(GCC target(t))
#endif
NATRPB_TARGET_PRAGMA(NATRPB_TARGET)
#endif

namespace natrpb::cpu::NATRPB_ISA {

inline constexpr int kVectorBytes = NATRPB_VECTOR_BYTES;

#include "cpu/simd.inl"

#include "cpu/local_attention_tiles.inl"

#include "cpu/local_attention_items.inl"

}  // namespace natrpb::cpu::NATRPB_ISA

#if defined(NATRPB_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
