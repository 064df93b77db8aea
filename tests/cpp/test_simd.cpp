// exp, log and bf16 of every instruction set that this processor has, against the standard library's in a wider type.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "storage.h"

#define NATRPB_ISA portable
#define NATRPB_VECTOR_BYTES 16
#include "simd_isa.inl"
#if defined(__x86_64__)
#define NATRPB_ISA avx2
#define NATRPB_VECTOR_BYTES 32
#define NATRPB_TARGET "avx2,fma,f16c"
#include "simd_isa.inl"
#define NATRPB_ISA avx512
#define NATRPB_VECTOR_BYTES 64
#define NATRPB_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "simd_isa.inl"
#define NATRPB_ISA avx512_bf16
#define NATRPB_VECTOR_BYTES 64
#define NATRPB_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#define NATRPB_BF16_PRODUCTS
#include "simd_isa.inl"
#endif

namespace {

using natrpb::cpu::Isa;
using natrpb::test::check;

constexpr int64_t kMostLanes = 16;

// Ordinary numbers, the borders of the results' range and beyond, infinities and NaN, in whole vectors.
template <class T>
std::vector<T> arguments() {
  using Limits = std::numeric_limits<T>;
  const T lowest = std::log(Limits::min()), highest = std::log(Limits::max());
  std::vector<T> x{T(0),          T(-0.0),       T(1), T(-1), Limits::min(), Limits::epsilon(), -Limits::epsilon(),
                   Limits::max(), -Limits::max()};
  for (const T border : {lowest, highest}) {
    for (int ulps = -40; ulps <= 40; ++ulps) x.push_back(border * (1 + ulps * Limits::epsilon()));
  }
  for (int i = 0; i <= 20000; ++i) x.push_back(lowest + (highest - lowest) * i / 20000);
  for (int i = 0; i <= 20000; ++i) x.push_back(T(-12) + T(24) * i / 20000);
  for (T power = 1; power < Limits::max() / 4; power *= T(1.37)) x.insert(x.end(), {power, 1 / power, -power});
  x.insert(x.end(), {Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN()});
  while (x.size() % kMostLanes) x.push_back(T(0));
  return x;
}

template <class T>
std::string text(const char* function, const std::string& isa, T x, T got) {
  char buffer[128];
  std::snprintf(buffer, sizeof buffer, " %s of %.17g is %.17g (%d bytes)", function, double(x), double(got), int(sizeof(T)));
  return isa + buffer;
}

template <class T>
void check_exp(const std::string& isa, T x, T got) {
  using Limits = std::numeric_limits<T>;
  const auto describe = [&] { return text("exp", isa, x, got); };
  const long double exact = std::exp(static_cast<long double>(x));
  const long double allowed = (2 + std::fabs(static_cast<long double>(x))) * Limits::epsilon();  // relative
  if (std::isnan(x)) return check(std::isnan(got), describe);
  check(got == 0 || got >= Limits::min(), describe);  // nothing subnormal
  if (exact < Limits::min() * (1 - allowed)) return check(got == 0, describe);
  if (exact > Limits::max() * (1 + allowed)) return check(got == Limits::infinity(), describe);
  const bool at_border = exact < Limits::min() * (1 + allowed) || exact > Limits::max() * (1 - allowed);
  check(std::fabs(got - exact) <= allowed * exact || (at_border && (got == 0 || got == Limits::infinity())), describe);
}

template <class T>
void check_log(const std::string& isa, T x, T got) {
  using Limits = std::numeric_limits<T>;
  const auto describe = [&] { return text("log", isa, x, got); };
  if (std::isnan(x)) return check(std::isnan(got), describe);
  if (x < 0 || (x > 0 && x < Limits::min())) return;  // sums of exponentials are zero, normal or infinite
  if (x == 0 || x == Limits::infinity()) return check(got == (x == 0 ? -Limits::infinity() : x), describe);
  const long double exact = std::log(static_cast<long double>(x));
  check(std::fabs(got - exact) <= 4 * Limits::epsilon() * std::fabs(exact), describe);
}

template <class T>
using Function = void (*)(const T*, int64_t, T*, T*);

template <class T>
void check_all(const std::string& isa, Function<T> function) {
  const std::vector<T> x = arguments<T>();
  std::vector<T> exps(x.size()), logs(x.size());
  function(x.data(), static_cast<int64_t>(x.size()), exps.data(), logs.data());
  for (size_t i = 0; i < x.size(); ++i) {
    check_exp(isa, x[i], exps[i]);
    check_log(isa, x[i], logs[i]);
  }
}

// The nearest bf16 number, of two the even one.
uint16_t nearest_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t low = bits & 0xffff, down = bits >> 16;
  return static_cast<uint16_t>(down + (low > 0x8000 || (low == 0x8000 && down & 1)));
}

double value_of(uint16_t bits) { return natrpb::test::Storage<natrpb::DType::kBFloat16>::load(bits); }

void check_rounding(const std::string& isa, float x, uint16_t got) {
  const auto describe = [&] { return text("bf16", isa, x, static_cast<float>(value_of(got))); };
  if (std::isnan(x)) return check(std::isnan(value_of(got)), describe);
  if (std::fabs(x) < std::numeric_limits<float>::min()) return check(std::fabs(value_of(got)) <= 1.2e-38, describe);
  check(got == nearest_bf16(x), describe);
}

// Numbers of all sizes, many halfway between two of bf16, both signs.
std::vector<float> to_be_rounded() {
  std::vector<float> x = arguments<float>();
  for (uint32_t upper = 0; upper < 0x10000; upper += 37) {
    for (const uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const uint32_t bits = upper << 16 | lower;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      x.push_back(value);
    }
  }
  while (x.size() % kMostLanes) x.push_back(0);
  return x;
}

void check_bf16(const std::string& isa, void (*round)(const float*, int64_t, uint16_t*)) {
  const std::vector<float> x = to_be_rounded();
  std::vector<uint16_t> rounded(x.size());
  round(x.data(), static_cast<int64_t>(x.size()), rounded.data());
  for (size_t i = 0; i < x.size(); ++i) check_rounding(isa, x[i], rounded[i]);
}

#if defined(__x86_64__)
void check_pairs() {
  const std::vector<float> x = to_be_rounded();
  const std::vector<float> y(x.rbegin(), x.rend());
  std::vector<uint16_t> pairs(2 * x.size());
  std::vector<float> sums(x.size(), 1.0f);
  natrpb::test::avx512_bf16::add_squares(x.data(), y.data(), static_cast<int64_t>(x.size()), pairs.data(), sums.data());
  for (size_t i = 0; i < x.size(); ++i) {
    check_rounding("avx512_bf16, first of a pair", x[i], pairs[2 * i]);
    check_rounding("avx512_bf16, second of a pair", y[i], pairs[2 * i + 1]);
    const double low = value_of(pairs[2 * i]), high = value_of(pairs[2 * i + 1]), exact = 1 + low * low + high * high;
    const auto describe = [&] { return text("sum of squares", "avx512_bf16", x[i], sums[i]); };
    if (std::isnan(exact)) {
      check(std::isnan(sums[i]), describe);
    } else if (exact > std::numeric_limits<float>::max()) {
      check(sums[i] == std::numeric_limits<float>::infinity(), describe);
    } else {
      check(std::fabs(sums[i] - exact) <= 2 * std::numeric_limits<float>::epsilon() * exact, describe);
    }
  }
}
#endif

}  // namespace

int main() {
  check_all<float>("portable", natrpb::test::portable::exp_and_log<float>);
  check_all<double>("portable", natrpb::test::portable::exp_and_log<double>);
  check_bf16("portable", natrpb::test::portable::round_to_bf16);
#if defined(__x86_64__)
  if (natrpb::cpu::detected_isa() >= Isa::kAvx2) {
    check_all<float>("avx2", natrpb::test::avx2::exp_and_log<float>);
    check_all<double>("avx2", natrpb::test::avx2::exp_and_log<double>);
    check_bf16("avx2", natrpb::test::avx2::round_to_bf16);
  }
  if (natrpb::cpu::detected_isa() >= Isa::kAvx512) {
    check_all<float>("avx512", natrpb::test::avx512::exp_and_log<float>);
    check_all<double>("avx512", natrpb::test::avx512::exp_and_log<double>);
    check_bf16("avx512", natrpb::test::avx512::round_to_bf16);
  }
  if (natrpb::cpu::detected_isa() >= Isa::kAvx512Bf16) {
    check_bf16("avx512_bf16", natrpb::test::avx512_bf16::round_to_bf16);
    check_pairs();
  }
#endif
  return natrpb::test::finish("test_simd");
}
