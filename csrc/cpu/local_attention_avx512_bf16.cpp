// Local attention compiled for AVX-512 with products of bf16 pairs (AVX512_BF16): 16 floats or pairs a vector.
#if defined(__x86_64__)
#define NATRPB_ISA avx512_bf16
#define NATRPB_VECTOR_BYTES 64
#define NATRPB_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#define NATRPB_BF16_PRODUCTS
#include "cpu/local_attention_isa.inl"
#endif
