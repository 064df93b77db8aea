// L2 normalisation compiled for AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles a vector.
#if defined(__x86_64__)
#define NATRPB_ISA avx512
#define NATRPB_VECTOR_BYTES 64
#define NATRPB_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "cpu/l2_normalize_isa.inl"
#endif
