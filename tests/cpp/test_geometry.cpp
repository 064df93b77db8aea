// Axis::keys against a definition by enumeration, Axis::queries against the inversion of Axis::keys, for every axis with
// L <= 20: neighborhood and causal with every kernel size, stride and dilation that fit, windows with every size and shift.
#include <string>
#include <vector>

#include "check.h"
#include "natrpb/geometry.h"

namespace {

using natrpb::Axis;
using natrpb::AxisKind;
using natrpb::Interval;
using natrpb::test::check;

constexpr int64_t kMaxLength = 20;

std::string describe(const Axis& axis, int64_t group, const char* what, int64_t index, Interval got) {
  const char* kinds[] = {"neighborhood", "causal", "window"};
  return std::string(kinds[static_cast<int>(axis.kind)]) + " L=" + std::to_string(axis.length) +
         " K=" + std::to_string(axis.kernel_size) + " s=" + std::to_string(axis.stride) +
         " d=" + std::to_string(axis.dilation) + " shift=" + std::to_string(axis.shift) + " group=" + std::to_string(group) +
         " " + what + " " + std::to_string(index) + ": got [" + std::to_string(got.first) + ", " + std::to_string(got.last) +
         "]";
}

// Whether query p sees key k among `size` positions, from the words of the definition and not from its closed form.
bool sees(const Axis& axis, int64_t p, int64_t k, int64_t size) {
  const int64_t K = axis.kernel_size, s = axis.stride;
  if (axis.kind == AxisKind::kWindow) {  // no boundary (shift + a multiple of K) lies between them
    for (int64_t boundary = axis.shift - K; boundary <= size; boundary += K) {
      if ((p < boundary) != (k < boundary)) return false;
    }
    return true;
  }
  // The leader of p's stride group: its middle query, or its last one if causal; the last query of all if that is missing.
  int64_t leader = p;
  while (leader % s != 0) --leader;
  leader += axis.kind == AxisKind::kCausal ? s - 1 : s / 2;
  if (leader >= size) leader = size - 1;
  if (axis.kind == AxisKind::kCausal) return k <= p && leader - k < K;
  // The K keys around the leader (K/2 of them before it), moved inside by single steps.
  int64_t first = leader - K / 2;
  while (first < 0) ++first;
  while (first + K > size) --first;
  return first <= k && k < first + K;
}

void check_axis(const Axis& axis) {
  std::vector<bool> covered(axis.length, false);
  for (int64_t group = 0; group < axis.groups(); ++group) {
    const int64_t size = axis.group_length(group);
    for (int64_t p = 0; p < size; ++p) {
      const int64_t position = axis.position(group, p);
      check(position < axis.length && !covered[position],
            [&] { return describe(axis, group, "position of", p, {position, position}); });
      covered[position] = true;

      const Interval keys = axis.keys(p, size);
      check(0 <= keys.first && keys.last < size && keys.contains(p),
            [&] { return describe(axis, group, "bounds of the keys of query", p, keys); });
      for (int64_t k = 0; k < size; ++k) {
        check(keys.contains(k) == sees(axis, p, k, size), [&] { return describe(axis, group, "keys of query", p, keys); });
        const Interval queries = axis.queries(k, size);
        check(queries.contains(p) == keys.contains(k), [&] { return describe(axis, group, "queries of key", k, queries); });
        const int64_t bias = axis.bias_index(p, k);
        check(!keys.contains(k) || (0 <= bias && bias <= 2 * axis.kernel_size - 2 && bias == k - p + axis.kernel_size - 1),
              [&] { return describe(axis, group, "bias index of query", p, {bias, bias}); });
      }
    }
    for (int64_t k = 0; k < size; ++k) {
      const Interval queries = axis.queries(k, size);
      check(0 <= queries.first && queries.last < size && queries.contains(k),
            [&] { return describe(axis, group, "bounds of the queries of key", k, queries); });
    }
  }
  for (int64_t position = 0; position < axis.length; ++position) {
    check(covered[position], [&] { return describe(axis, 0, "uncovered position", position, {}); });
  }
}

}  // namespace

int main() {
  for (int64_t length = 1; length <= kMaxLength; ++length) {
    for (int64_t kernel = 1; kernel <= length; ++kernel) {
      for (int64_t dilation = 1; kernel * dilation <= length; ++dilation) {
        for (int64_t stride = 1; stride <= kernel; ++stride) {
          check_axis({length, kernel, stride, dilation, 0, AxisKind::kNeighborhood});
          check_axis({length, kernel, stride, dilation, 0, AxisKind::kCausal});
        }
      }
    }
    for (int64_t window = 1; window <= length + 2; ++window) {  // windows may be larger than the axis
      for (int64_t shift = 0; shift < window; ++shift) check_axis({length, window, 1, 1, shift, AxisKind::kWindow});
    }
  }
  return natrpb::test::finish("geometry");
}
