// What this processor can do at most, measured: the yardsticks that benchmarks divide by. Each runs in the calling thread alone;
// call it from several threads at once for what they reach together.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace natrpb::cpu {

// fp32 multiply-adds in registers, nothing loaded or stored, counted as 2 operations: GFLOP/s of the fastest of
// many passes within about `seconds`, each long enough (about a millisecond) to be the processor's lasting rate.
// The set must not be wider than detected_isa(). Sets without fused multiply-add multiply and add.
double fma_gflops(Isa isa, double seconds);

enum class Stream { kCopy, kTriad };

// kCopy: a[i] = b[i]; kTriad: a[i] = b[i] + 3 c[i], on arrays of `elements` floats, stored past the caches: the fastest pass
// within about `seconds`, in GB/s of the bytes named (8 and 12 an element).
double stream_gbytes(Stream stream, int64_t elements, double seconds);

}  // namespace natrpb::cpu
