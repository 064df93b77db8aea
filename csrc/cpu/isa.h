// Which vector instructions this processor and its operating system offer, and which the kernels use.
#pragma once

namespace natrpb::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

const char* isa_name(Isa isa);

// The widest set that this build holds and this machine runs.
Isa detected_isa();

// detected_isa(), unless the environment variable NATRPB_ISA names a narrower set (portable, avx2, avx512). Read once.
Isa active_isa();

}  // namespace natrpb::cpu
