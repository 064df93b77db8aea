#include "cpu/yardstick.h"

#include <algorithm>
#include <chrono>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace natrpb::cpu {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

#define NATRPB_FUNCTION fma_portable
#define NATRPB_VECTOR_BYTES 16
#define NATRPB_TARGET
#include "cpu/yardstick_fma.inl"
#undef NATRPB_FUNCTION
#undef NATRPB_VECTOR_BYTES
#undef NATRPB_TARGET

#if defined(__x86_64__)
#define NATRPB_FUNCTION fma_avx2
#define NATRPB_VECTOR_BYTES 32
#define NATRPB_TARGET __attribute__((target("avx2,fma")))
#include "cpu/yardstick_fma.inl"
#undef NATRPB_FUNCTION
#undef NATRPB_VECTOR_BYTES
#undef NATRPB_TARGET

#define NATRPB_FUNCTION fma_avx512
#define NATRPB_VECTOR_BYTES 64
#define NATRPB_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#include "cpu/yardstick_fma.inl"
#endif

// a[i] = b[i] + factor * c[i] without reading a into the caches; c may be null for a plain copy.
void pass(float* a, const float* b, const float* c, float factor, int64_t elements) {
#if defined(__x86_64__)
  const __m128 factors = _mm_set1_ps(factor);
  for (int64_t i = 0; i + 4 <= elements; i += 4) {
    const __m128 x = _mm_loadu_ps(b + i);
    _mm_stream_ps(a + i, c ? _mm_add_ps(x, _mm_mul_ps(factors, _mm_loadu_ps(c + i))) : x);
  }
  _mm_sfence();
#else
  for (int64_t i = 0; i < elements; ++i) a[i] = c ? b[i] + factor * c[i] : b[i];
#endif
}

}  // namespace

double fma_gflops(Isa isa, double seconds) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return fma_avx512(seconds);
  if (isa == Isa::kAvx2) return fma_avx2(seconds);
#else
  static_cast<void>(isa);
#endif
  return fma_portable(seconds);
}

double stream_gbytes(Stream stream, int64_t elements, double seconds) {
  constexpr int64_t kAlignment = 16 / sizeof(float);
  elements = (elements + kAlignment - 1) / kAlignment * kAlignment;
  std::vector<float> store(3 * elements + kAlignment, 1.0f);
  const int64_t offset = (16 - reinterpret_cast<uintptr_t>(store.data()) % 16) / sizeof(float) % kAlignment;
  float *const a = store.data() + offset, *const b = a + elements, *const c = stream == Stream::kTriad ? b + elements : nullptr;
  double best = 0;
  const double start = now();
  for (double before = start; before - start < seconds;) {
    pass(a, b, c, 3.0f, elements);
    const double after = now();
    best = std::max(best, 4e-9 * static_cast<double>((c ? 3 : 2) * elements) / (after - before));
    before = after;
  }
  return best;
}

}  // namespace natrpb::cpu
