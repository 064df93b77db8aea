// exp and log of every instruction set that this processor has, against the standard library's in a wider type.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/isa.h"

#define NATRPB_ISA portable
#define NATRPB_VECTOR_BYTES 16
#include "simd_isa.inl"
#if defined(__x86_64__)
#pragma GCC push_options
#define NATRPB_ISA avx2
#define NATRPB_VECTOR_BYTES 32
#define NATRPB_TARGET "avx2,fma,f16c"
#include "simd_isa.inl"
#pragma GCC pop_options
#pragma GCC push_options
#define NATRPB_ISA avx512
#define NATRPB_VECTOR_BYTES 64
#define NATRPB_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"
#include "simd_isa.inl"
#pragma GCC pop_options
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

}  // namespace

int main() {
  check_all<float>("portable", natrpb::test::portable::exp_and_log<float>);
  check_all<double>("portable", natrpb::test::portable::exp_and_log<double>);
#if defined(__x86_64__)
  if (natrpb::cpu::detected_isa() >= Isa::kAvx2) {
    check_all<float>("avx2", natrpb::test::avx2::exp_and_log<float>);
    check_all<double>("avx2", natrpb::test::avx2::exp_and_log<double>);
  }
  if (natrpb::cpu::detected_isa() >= Isa::kAvx512) {
    check_all<float>("avx512", natrpb::test::avx512::exp_and_log<float>);
    check_all<double>("avx512", natrpb::test::avx512::exp_and_log<double>);
  }
#endif
  return natrpb::test::finish("test_simd");
}
