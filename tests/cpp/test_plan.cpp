// The cut of an op into boxes: every query in exactly one box, every key that a box needs inside its key box, and no key
// shared by two boxes of one color (their sums are formed at the same time).
#include <cstdio>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/plan.h"

namespace {

using natrpb::Axis;
using natrpb::AxisKind;
using natrpb::Interval;
using natrpb::cpu::is_windowed;
using natrpb::cpu::Item;
using natrpb::cpu::Plan;

// Staged channels per key: none leaves the cut to the number of items, many forces the smallest boxes.
constexpr int64_t kChannels[] = {1, 1 << 20};

void check_axis(const natrpb::LocalAttentionParams& params, int a, const std::string& name) {
  for (int64_t channels : kChannels) {
    const Plan plan = natrpb::cpu::make_plan(params, channels);
    const Axis& axis = params.axis[a];
    for (int64_t group_and_head = 0; group_and_head < plan.groups[a] * params.heads; ++group_and_head) {
      const int64_t group = group_and_head / params.heads, head = group_and_head % params.heads;
      const int64_t size = axis.group_length(group);
      std::vector<int> owners(size, 0);
      std::vector<std::vector<int>> colored(2, std::vector<int>(size, 0));
      for (int64_t box = 0; box < plan.boxes[a]; ++box) {
        // The other axes have one position, so that boxes and groups of this axis alone count up.
        const Item item = natrpb::cpu::locate(params, plan, (head * plan.groups[a] + group) * plan.boxes[a] + box);
        natrpb::test::check(item.group[a] == group && item.head == head,
                            [&] { return name + ": items are not in the order of batch, head, group, box"; });
        natrpb::test::check((item.color & ~plan.color_bits) == 0, [&] { return name + ": a color that has no turn"; });
        if (item.empty) continue;
        const Interval keys{item.key_lo[a], item.key_lo[a] + item.key_n[a] - 1};
        natrpb::test::check(item.key_n[a] <= plan.key_size[a], [&] { return name + ": a key box is larger than planned"; });
        for (int64_t p = item.lo[a]; p < item.hi[a]; ++p) {
          ++owners[p];
          const Interval seen = axis.keys(p, size);
          natrpb::test::check(keys.contains(seen.first) && keys.contains(seen.last),
                              [&] { return name + ": query " + std::to_string(p) + " needs a key outside of its box"; });
          const Interval back = axis.keys(seen.first, size);
          natrpb::test::check(!is_windowed(params) || (back.first == seen.first && back.last == seen.last),
                              [&] { return name + ": query " + std::to_string(p) + " is in no window"; });
        }
        for (int64_t k = keys.first; k <= keys.last; ++k) ++colored[item.color >> a & 1][k];
      }
      for (int64_t p = 0; p < size; ++p) {
        natrpb::test::check(owners[p] == 1, [&] { return name + ": query " + std::to_string(p) + " is not in one box"; });
        natrpb::test::check(colored[0][p] <= 1 && colored[1][p] <= 1,
                            [&] { return name + ": key " + std::to_string(p) + " is shared by boxes of one color"; });
      }
    }
  }
}

void check_all(int a, Axis axis) {
  for (axis.length = 1; axis.length <= 150; ++axis.length) {
    const bool window = axis.kind == AxisKind::kWindow;
    if (!window && axis.kernel_size * axis.dilation > axis.length) continue;
    natrpb::LocalAttentionParams params;
    params.heads = 2;  // the second one goes through its boxes backwards
    params.axis[a] = axis;
    char name[128];
    std::snprintf(name, sizeof name, "axis %d, kind %d, L %d, K %d, stride %d, dilation %d, shift %d", a,
                  static_cast<int>(axis.kind), static_cast<int>(axis.length), static_cast<int>(axis.kernel_size),
                  static_cast<int>(axis.stride), static_cast<int>(axis.dilation), static_cast<int>(axis.shift));
    check_axis(params, a, name);
  }
}

// Which patterns are done window by window.
void check_windowed() {
  const auto axis = [](AxisKind kind, int64_t length, int64_t kernel_size) {
    Axis axis;
    axis.kind = kind;
    axis.length = length;
    axis.kernel_size = kernel_size;
    return axis;
  };
  const auto expect = [](bool expected, Axis rows, Axis columns, const char* what) {
    natrpb::LocalAttentionParams params;
    params.axis[1] = rows;
    params.axis[2] = columns;
    natrpb::test::check(is_windowed(params) == expected, [&] { return std::string(what) + ": windowed or not"; });
  };
  const Axis window = axis(AxisKind::kWindow, 56, 7);
  expect(true, window, window, "windows");
  expect(true, axis(AxisKind::kNeighborhood, 7, 7), axis(AxisKind::kNeighborhood, 5, 5), "neighborhoods of the whole map");
  expect(true, window, axis(AxisKind::kNeighborhood, 7, 7), "a window on one axis, all of the other");
  expect(false, window, axis(AxisKind::kNeighborhood, 8, 7), "neighborhoods on one axis");
  expect(false, window, axis(AxisKind::kCausal, 7, 7), "causal on one axis");
  expect(false, axis(AxisKind::kWindow, 56, 3), axis(AxisKind::kWindow, 56, 5), "fifteen positions");
  expect(true, axis(AxisKind::kWindow, 56, 16), axis(AxisKind::kWindow, 56, 32), "512 positions");
  expect(false, axis(AxisKind::kWindow, 56, 19), axis(AxisKind::kWindow, 56, 27), "513 positions");
  expect(false, axis(AxisKind::kWindow, 3, 16), axis(AxisKind::kWindow, 5, 32), "a map of fifteen positions");
}

}  // namespace

int main() {
  check_windowed();
  for (int a : {1, 2}) {
    for (int64_t kernel_size : {1, 2, 3, 4, 7, 8, 13, 17}) {
      Axis axis;
      axis.kernel_size = kernel_size;
      for (axis.kind = AxisKind::kNeighborhood;; axis.kind = AxisKind::kCausal) {
        for (axis.stride = 1; axis.stride <= kernel_size; ++axis.stride) {
          for (axis.dilation = 1; axis.dilation <= 3; ++axis.dilation) check_all(a, axis);
        }
        if (axis.kind == AxisKind::kCausal) break;
      }
      axis.kind = AxisKind::kWindow;
      axis.stride = axis.dilation = 1;
      for (axis.shift = 0; axis.shift < kernel_size; ++axis.shift) check_all(a, axis);
    }
  }
  return natrpb::test::finish("plan");
}
