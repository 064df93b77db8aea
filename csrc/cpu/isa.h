// Which vector instructions this processor and its operating system offer, and which the kernels use.
#pragma once

namespace natrpb::cpu {

// Each set holds the ones before it.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* isa_name(Isa isa);

// The widest set that this build holds and this machine runs.
Isa detected_isa();

// The set that the kernels use: the one that the environment variable NATRPB_ISA names (portable, avx2, avx512, avx512_bf16, amx),
// where this machine runs it, else detected_isa(), without products of bf16 pairs where those are not known to be fast. Read once.
Isa active_isa();

}  // namespace natrpb::cpu
