// The ops of image relative position encodings on the CPU.
#include "irpe_ops.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "device_cpu.h"

namespace {

using natrpb::IrpeAttentionParams;
using natrpb::RpeIndexParams;
using natrpb::Status;
using natrpb::binding::CpuDevice;
using natrpb::binding::ScalarType;
using natrpb::binding::Tensor;
namespace cpu = natrpb::cpu;

// Throws where an entry is outside of [0, buckets): kernels read and write by these numbers.
template <class I>
void check_entries(const char* name, const Tensor& index, int64_t buckets) {
  typedef std::make_unsigned_t<I> U;  // of which a negative entry is a large one
  const I* entries = static_cast<const I*>(index.data_ptr());
  const int64_t count = index.numel();
  const U limit =
      buckets > std::numeric_limits<I>::max() ? static_cast<U>(std::numeric_limits<I>::max()) + 1 : static_cast<U>(buckets);
  bool bad = false;
  for (int64_t i = 0; i < count; ++i) bad |= static_cast<U>(entries[i]) >= limit;
  if (!bad) return;
  const I* first = std::find_if(entries, entries + count, [=](I entry) { return static_cast<U>(entry) >= limit; });
  STD_TORCH_CHECK(false, name, " must hold numbers from 0 to ", buckets - 1, ", got ", *first);
}

struct Cpu : CpuDevice {
  using CpuDevice::CpuDevice;

  void check_map(const char* name, const Tensor& index, int64_t buckets) const {
    const bool narrow = index.scalar_type() == ScalarType::Int;
    narrow ? check_entries<int32_t>(name, index, buckets) : check_entries<int64_t>(name, index, buckets);
  }

  Status rpe_index(const RpeIndexParams& p) const { return cpu::rpe_index(p, parallel_for); }
  Status rpe_index_transposed(const RpeIndexParams& p) const { return cpu::rpe_index_transposed(p, parallel_for); }
  int64_t irpe_attention_backward_workspace(const IrpeAttentionParams& p) const {
    return cpu::irpe_attention_backward_workspace(p);
  }
  Status irpe_attention_forward(const IrpeAttentionParams& p) const { return cpu::irpe_attention_forward(p, parallel_for); }
  Status irpe_attention_backward(const IrpeAttentionParams& p) const { return cpu::irpe_attention_backward(p, parallel_for); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(natrpb, CPU, m) { natrpb::binding::IrpeOps<Cpu>::implement(m); }
