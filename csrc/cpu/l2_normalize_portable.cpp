// L2 normalisation compiled for any processor: 16-byte vectors, which are SSE2 on x86-64 and NEON on aarch64.
#define NATRPB_ISA portable
#define NATRPB_VECTOR_BYTES 16
#include "cpu/l2_normalize_isa.inl"
