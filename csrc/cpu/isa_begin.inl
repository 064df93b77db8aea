// From here on everything is compiled for NATRPB_TARGET, see local_attention_isa.inl; isa_end.inl ends that.
#if defined(__x86_64__)
#define NATRPB_X86
#include <immintrin.h>
#endif

#define NATRPB_INLINE inline __attribute__((always_inline))
#define NATRPB_LAMBDA __attribute__((always_inline))
// Before a loop over a constant range.
#ifdef __clang__
#define NATRPB_UNROLL _Pragma("clang loop unroll(full)")
#else
#define NATRPB_UNROLL _Pragma("GCC unroll 64")
#endif
#define NATRPB_PRAGMA(text) _Pragma(#text)

#ifdef NATRPB_TARGET
#ifdef __clang__
#define NATRPB_TARGET_PRAGMA(t) NATRPB_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#else
#define NATRPB_TARGET_PRAGMA(t) NATRPB_PRAGMA(GCC target(t))
#endif
NATRPB_TARGET_PRAGMA(NATRPB_TARGET)
#if NATRPB_VECTOR_BYTES == 64 && !defined(__clang__)
NATRPB_TARGET_PRAGMA("prefer-vector-width=512")  // clang, which needs no such advice, would ignore the whole attribute
#endif
#endif
