// One function of yardstick.cpp, which has chosen NATRPB_FUNCTION, NATRPB_VECTOR_BYTES and NATRPB_TARGET.

// Each chain waits for its own last result; two pipes of latency 4 need 8 chains, and 12 leave registers for x and y even
// where there are only 16. Every chain tends to y / (1 - x), far from denormals.
NATRPB_TARGET double NATRPB_FUNCTION(double seconds) {
  typedef float Vector __attribute__((vector_size(NATRPB_VECTOR_BYTES)));
  constexpr int64_t kSteps = 1 << 18, kLanes = NATRPB_VECTOR_BYTES / sizeof(float), kChains = 12;
  volatile float opaque = 0.5f;  // keeps the compiler from knowing the factors
  const Vector x = opaque - Vector{}, y = 2 * opaque - Vector{};
  Vector a = y, b = y + 1, c = y + 2, d = y + 3, e = y + 4, f = y + 5;
  Vector g = y + 6, h = y + 7, i = y + 8, j = y + 9, k = y + 10, l = y + 11;
  double best = 0;
  const double start = now();
  for (double before = start; before - start < seconds;) {
    for (int64_t step = 0; step < kSteps; ++step) {
      a = a * x + y, b = b * x + y, c = c * x + y, d = d * x + y, e = e * x + y, f = f * x + y;
      g = g * x + y, h = h * x + y, i = i * x + y, j = j * x + y, k = k * x + y, l = l * x + y;
    }
    const double after = now();
    best = std::max(best, 2e-9 * static_cast<double>(kSteps * kChains * kLanes) / (after - before));
    before = after;
  }
  const Vector sum = a + b + c + d + e + f + g + h + i + j + k + l;
  for (int64_t lane = 0; lane < kLanes; ++lane) opaque = opaque + sum[lane];
  return best;
}
