// How an op is cut into independent work items, and what lies where in a thread's scratch memory.
//
// An item is one (batch, head, residue group, box of queries). Its keys are the union of its queries' intervals, a box again.
// The cut depends on shapes alone, never on threads: sums that cross items are formed in a fixed order, so results are equal
// in bits for any number of threads.
//
// Some heads go through their boxes backwards, so that two threads that begin at different heads of a heads-last tensor do not write
// to the same places of the map at the same time: that costs up to half as much time again, though they share no cache line
// (docs/design/cpu.md).
#pragma once

#include <cstddef>
#include <cstdint>

#include "natrpb/local_attention.h"

namespace natrpb::cpu {

struct Plan {
  int64_t groups[kAxes];    // residue groups per axis
  int64_t boxes[kAxes];     // query boxes per axis of the longest group
  int64_t box_size[kAxes];  // queries per box, the last one may hold fewer
  int64_t key_size[kAxes];  // most keys that a box needs per axis
  int64_t groups_total;
  int64_t boxes_total;  // per residue group
  int64_t color_bits;   // bit a: neighboring boxes share keys on axis a, see Item::color; boxes two apart never do
  int64_t items;
  int64_t keys_max;  // product of key_size
  int64_t slots;     // K_0 K_1 K_2
  int64_t table;     // entries of one head's bias table

  bool keys_shared() const { return color_bits != 0; }
};

// Whether queries attend within windows of a size that WindowWorker is made for: all queries of one see all its keys, which are the same
// positions. Neighborhoods as large as the map are such windows, too.
bool is_windowed(const LocalAttentionParams& params);

// `channels` is the number of compute-type elements that the op stages per key.
Plan make_plan(const LocalAttentionParams& params, int64_t channels);

struct Item {
  int64_t batch, head;
  int64_t index;         // of the item
  int64_t group[kAxes];  // residue
  int64_t size[kAxes];   // positions in the group
  int64_t lo[kAxes];     // queries lo .. hi - 1, in-group
  int64_t hi[kAxes];
  int64_t key_lo[kAxes];  // keys key_lo .. key_lo + key_n - 1, in-group
  int64_t key_n[kAxes];
  // Boxes of one color share no key; sums of keys are formed color by color. Bit a: whether the box has an odd turn on axis a, where
  // keys are shared.
  int64_t color;
  bool empty;

  int64_t keys() const { return key_n[0] * key_n[1] * key_n[2]; }

  // The keys on axis a, relative to key_lo, that no box of an earlier color has written to.
  Interval fresh(const Axis* axes, int a) const {
    Interval keys{0, key_n[a] - 1};
    if (!(color >> a & 1)) return keys;
    if (lo[a] > 0) keys.first = max_of(keys.first, axes[a].keys(lo[a] - 1, size[a]).last + 1 - key_lo[a]);
    if (hi[a] < size[a]) keys.last = min_of(keys.last, axes[a].keys(hi[a], size[a]).first - 1 - key_lo[a]);
    return keys;
  }
};

Item locate(const LocalAttentionParams& params, const Plan& plan, int64_t index);

// Hands out 64-byte-aligned pieces of one buffer. With a null buffer it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace natrpb::cpu
