#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
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

// Whether this process may use the tiles of AMX and their products of bf16 pairs, given leaf 7's edx and XCR0. Linux lets a process use
// them once it has asked.
bool has_tiles([[maybe_unused]] unsigned features, [[maybe_unused]] unsigned long long saved) {
#if defined(NATRPB_TILE_TWIN)
  return true;
#elif defined(__linux__)
  constexpr unsigned kAmx = (1u << 22) | (1u << 24);           // BF16, TILE
  constexpr unsigned long long kTileState = 0x60000;           // their configuration and data
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl
  return (features & kAmx) == kAmx && (saved & kTileState) == kTileState &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
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
  if ((b & kAvx512) != kAvx512 || (saved & kZmm) != kZmm) return Isa::kAvx2;
  const unsigned features = d;
  constexpr unsigned kAvx512Bf16 = 1u << 5;  // leaf 7, 1, eax
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return Isa::kAvx512;
  return has_tiles(features, saved) ? Isa::kAmx : Isa::kAvx512Bf16;
}

// Whether products of bf16 pairs come at the rate of fp32 multiply-adds. NB: measured on Zen 4 and Zen 5 (AMD's families 25 and 26); a
// Xeon with AMX makes them at a quarter of that rate, half as many products a second as in fp32.
bool pairs_are_fast() {
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return false;
  const bool amd = b == signature_AMD_ebx && d == signature_AMD_edx && c == signature_AMD_ecx;
  if (!amd || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  const unsigned base = a >> 8 & 0xf, extended = a >> 20 & 0xff;
  return base + extended >= 25;
}
#else
Isa detect() { return Isa::kPortable; }
bool pairs_are_fast() { return false; }
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
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
    for (Isa candidate : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
      if (wanted && !std::strcmp(wanted, isa_name(candidate)) && candidate <= detected_isa()) return candidate;
    }
    return detected_isa() == Isa::kAvx512Bf16 && !pairs_are_fast() ? Isa::kAvx512 : detected_isa();
  }();
  return isa;
}

}  // namespace natrpb::cpu
