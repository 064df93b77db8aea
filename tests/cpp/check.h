// The whole test framework: check(condition, what) reports the first few failures, finish() closes with the counts.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace natrpb::test {

inline int64_t checks = 0;
inline int64_t failures = 0;

// `describe` is called only where the condition fails.
template <class Describe>
void check(bool condition, Describe describe) {
  ++checks;
  if (condition) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", std::string(describe()).c_str());
}

inline int finish(const char* name) {
  std::printf("%s: %lld checks, %lld failed\n", name, static_cast<long long>(checks), static_cast<long long>(failures));
  return failures ? 1 : 0;
}

}  // namespace natrpb::test
