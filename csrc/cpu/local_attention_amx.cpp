// Attention within windows, in bf16, compiled for AMX: products of 16 x 32 and 32 x 16 numbers. Vectors are AVX-512's.
#if defined(__x86_64__)
#define NATRPB_ISA amx
#define NATRPB_VECTOR_BYTES 64
#define NATRPB_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#define NATRPB_BF16_PRODUCTS
#define NATRPB_TILES
#include "cpu/local_attention_isa.inl"
#endif
