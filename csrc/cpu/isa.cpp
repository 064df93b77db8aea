#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace natrpb::cpu {

namespace {

#if defined(__x86_64__)
// Register state that the operating system saves on a context switch (XCR0).
unsigned long long saved_state() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

Isa detect() {
  constexpr unsigned kOsxsave = 1u << 27, kFma = 1u << 12, kF16c = 1u << 29;                        // leaf 1, ecx
  constexpr unsigned kAvx2 = 1u << 5, kAvx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // leaf 7, ebx: F DQ BW VL
  constexpr unsigned long long kYmm = 0x6, kZmm = 0xe6;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (kOsxsave | kFma | kF16c)) != (kOsxsave | kFma | kF16c)) {
    return Isa::kPortable;
  }
  const unsigned long long saved = saved_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & kAvx2) || (saved & kYmm) != kYmm) return Isa::kPortable;
  return (b & kAvx512) == kAvx512 && (saved & kZmm) == kZmm ? Isa::kAvx512 : Isa::kAvx2;
}
#else
Isa detect() { return Isa::kPortable; }
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  static const Isa isa = [] {
    const char* wanted = std::getenv("NATRPB_ISA");
    for (Isa candidate : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
      if (wanted && !std::strcmp(wanted, isa_name(candidate)) && candidate < detected_isa()) return candidate;
    }
    return detected_isa();
  }();
  return isa;
}

}  // namespace natrpb::cpu
