#include "cpu/plan.h"

namespace natrpb::cpu {

namespace {

// A box's staged keys should stay in a core's second-level cache beside the score block. Neighborhoods may spill into the next
// level: what is gained there by cutting is less than halos and colored phases cost (docs/design/cpu.md).
constexpr int64_t kWindowElements = 192 * 1024, kNeighborhoodElements = 768 * 1024;
// Enough items to keep a few cores busy evenly, as long as the halos do not repeat more than half of the keys.
constexpr int64_t kItemsWanted = 16;
constexpr double kHaloAllowed = 1.5;
// Axis 2 is cut in multiples of the widest vector's lanes.
constexpr int64_t kColumnUnit = 16;

// Windows of fewer positions would leave most lanes of a vector empty; the scores of more do not stay in a core's caches.
constexpr int64_t kLeastPositions = 16, kMostPositions = 512;

bool is_window(const Axis& axis) { return axis.kind == AxisKind::kWindow; }

// Boxes of windowed axes start where windows start, so that no key belongs to two boxes.
int64_t box_offset(const Axis& axis) { return is_window(axis) && axis.shift > 0 ? axis.kernel_size - axis.shift : 0; }

int64_t key_extent(const Axis& axis, int64_t box, int64_t group_length) {
  const int64_t halo = is_window(axis) ? 0 : axis.kernel_size - 1 + axis.stride - 1;
  return min_of(box + halo, group_length);
}

// Box sizes are multiples of this, and no box smaller than twice `least` is cut. NB: a box of 2K queries is longer than the keys
// that its two neighbors reach into it, so boxes two apart share no key; tests/cpp checks that.
int64_t box_unit(const Axis& axis, bool columns) { return is_window(axis) ? axis.kernel_size : columns ? kColumnUnit : 1; }
int64_t least_box(const Axis& axis, bool columns) {
  return is_window(axis) ? axis.kernel_size : max_of(2 * axis.kernel_size, columns ? kColumnUnit : 1);
}

bool shares_keys(const LocalAttentionParams& params, const Plan& plan, int axis) {
  return plan.boxes[axis] > 1 && !is_window(params.axis[axis]);
}

// Whether a head's boxes have their turns in descending order: every other one, and those of the second half the other way round.
bool goes_backwards(int64_t heads, int64_t head) {
  const int64_t half = ceil_div(heads, 2);
  return (head % half + head / half) % 2 == 1;
}

}  // namespace

bool is_windowed(const LocalAttentionParams& params) {
  int64_t positions = 1;
  for (const Axis& axis : params.axis) {
    const bool whole = axis.kind == AxisKind::kNeighborhood && axis.kernel_size == axis.group_length(axis.groups() - 1) &&
                       axis.kernel_size == axis.group_length(0);
    if (!is_window(axis) && !whole) return false;
    positions *= min_of(axis.kernel_size, axis.group_length(0));
  }
  return positions >= kLeastPositions && positions <= kMostPositions;
}

Plan make_plan(const LocalAttentionParams& params, int64_t channels) {
  Plan plan{};
  plan.groups_total = plan.slots = plan.table = 1;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = params.axis[a];
    plan.groups[a] = axis.groups();
    plan.groups_total *= plan.groups[a];
    plan.slots *= axis.kernel_size;
    plan.table *= 2 * axis.kernel_size - 1;
    plan.box_size[a] = axis.group_length(0) + box_offset(axis);
  }
  const auto measure = [&] {
    plan.boxes_total = plan.keys_max = 1;
    plan.color_bits = 0;
    for (int a = 0; a < kAxes; ++a) {
      const int64_t longest = params.axis[a].group_length(0);
      plan.boxes[a] = ceil_div(longest + box_offset(params.axis[a]), plan.box_size[a]);
      plan.key_size[a] = key_extent(params.axis[a], plan.box_size[a], longest);
      if (shares_keys(params, plan, a)) plan.color_bits |= int64_t{1} << a;
      plan.boxes_total *= plan.boxes[a];
      plan.keys_max *= plan.key_size[a];
    }
    plan.items = params.batch * params.heads * plan.groups_total * plan.boxes_total;
  };
  measure();
  // Halve the outermost axis that is still long beside its kernel, until items are small and many enough.
  while (true) {
    const Plan before = plan;
    int cut = -1;
    for (int a = 0; a < kAxes && cut < 0; ++a) {
      if (plan.box_size[a] >= 2 * least_box(params.axis[a], a == kAxes - 1)) cut = a;
    }
    if (cut < 0) break;
    const int64_t most = is_window(params.axis[cut]) ? kWindowElements : kNeighborhoodElements;
    const bool too_large = plan.keys_max * channels > most;
    if (plan.items >= kItemsWanted && !too_large) break;
    const int64_t unit = box_unit(params.axis[cut], cut == kAxes - 1);
    plan.box_size[cut] = ceil_div(ceil_div(plan.box_size[cut], 2), unit) * unit;
    measure();
    const int64_t queries = plan.box_size[0] * plan.box_size[1] * plan.box_size[2];
    if (!too_large && static_cast<double>(plan.keys_max) > kHaloAllowed * static_cast<double>(queries)) return before;
  }
  return plan;
}

Item locate(const LocalAttentionParams& params, const Plan& plan, int64_t index) {
  Item item{};
  item.index = index;
  int64_t rest = index;
  int64_t turn[kAxes];  // of the box
  for (int a = kAxes - 1; a >= 0; --a) {
    turn[a] = rest % plan.boxes[a];
    rest /= plan.boxes[a];
  }
  for (int a = kAxes - 1; a >= 0; --a) {
    item.group[a] = rest % plan.groups[a];
    rest /= plan.groups[a];
  }
  item.head = rest % params.heads;
  item.batch = rest / params.heads;
  const bool is_reversed = goes_backwards(params.heads, item.head);
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = params.axis[a];
    item.size[a] = axis.group_length(item.group[a]);
    const int64_t box = is_reversed ? plan.boxes[a] - 1 - turn[a] : turn[a];
    const int64_t start = box * plan.box_size[a] - box_offset(axis);
    item.lo[a] = max_of(start, 0);
    item.hi[a] = min_of(start + plan.box_size[a], item.size[a]);
    if (item.lo[a] >= item.hi[a]) {
      item.empty = true;
      return item;
    }
    item.key_lo[a] = axis.keys(item.lo[a], item.size[a]).first;
    if (plan.color_bits >> a & 1) item.color |= (turn[a] & 1) << a;
    item.key_n[a] = axis.keys(item.hi[a] - 1, item.size[a]).last - item.key_lo[a] + 1;
  }
  return item;
}

}  // namespace natrpb::cpu
