// L2 normalisation compiled for AVX2 with FMA and F16C: 8 floats or 4 doubles a vector.
#if defined(__x86_64__)
#define NATRPB_ISA avx2
#define NATRPB_VECTOR_BYTES 32
#define NATRPB_TARGET "avx2,fma,f16c"
#include "cpu/l2_normalize_isa.inl"
#endif
