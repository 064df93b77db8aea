// From tensors to LocalAttentionParams: what every local-attention op checks and shares, whatever device runs it.
#pragma once

#include <array>
#include <string>

#include "tensors.h"

namespace natrpb::binding {

enum class Layout { kHeadsLast, kHeadsFirst };  // [B, *, h, D] or [B, h, *, D]

// The pattern, the sizes and the storage type, taken from one [B, *, h, channels] tensor of the call.
struct LocalAttentionCall {
  static constexpr int64_t kMostSlots = int64_t{1} << 31;  // sizes of scratch memory stay far below overflow

  LocalAttentionParams params;
  int64_t ndim;
  Layout layout;
  Ints spatial;

  LocalAttentionCall(const char* name, const Tensor& model, Layout layout_, const Ints& kernel_size, const Ints& stride,
                     const Ints& dilation, const Ints& kind, const Ints& shift)
      : ndim(static_cast<int64_t>(kernel_size.size())), layout(layout_) {
    STD_TORCH_CHECK(1 <= ndim && ndim <= kAxes, "kernel_size must have 1 to 3 entries, got ", ndim);
    for (const Ints* list : {&stride, &dilation, &kind, &shift}) {
      STD_TORCH_CHECK(list->size() == kernel_size.size(), "pattern lists must have one entry per axis (", ndim, "), got ",
                      list->size());
    }
    STD_TORCH_CHECK(model.dim() == ndim + 3, name, " must have ", ndim + 3, " axes, got shape ", shape_of(model));
    params.dtype = dtype_of(name, model);
    params.batch = model.size(0);
    params.heads = model.size(layout == Layout::kHeadsLast ? ndim + 1 : 1);
    for (int64_t i = 0, count = 1; i < ndim; ++i, count *= kernel_size[i - 1]) {
      STD_TORCH_CHECK(kernel_size[i] < 1 || kernel_size[i] <= kMostSlots / count, "kernel_size must span at most ", kMostSlots,
                      " keys over all axes, got ", kernel_size[i], " on axis ", i);
      Axis& axis = params.axis[kAxes - ndim + i];
      axis.length = model.size(first_axis() + i);
      axis.kernel_size = kernel_size[i];
      axis.stride = stride[i];
      axis.dilation = dilation[i];
      axis.shift = shift[i];
      STD_TORCH_CHECK(0 <= kind[i] && kind[i] <= 2, "kind must be 0, 1 or 2, got ", kind[i]);
      axis.kind = static_cast<AxisKind>(kind[i]);
      spatial.push_back(axis.length);
      check_axis(axis, i, model.numel() == 0);
    }
  }

  int64_t first_axis() const { return layout == Layout::kHeadsLast ? 1 : 2; }
  int64_t slots() const { return params.axis[0].kernel_size * params.axis[1].kernel_size * params.axis[2].kernel_size; }

  // Sizes of a tensor of this call with `channels` on the last axis; none for one number per query (lse).
  Ints sizes(int64_t channels) const {
    Ints shape{params.batch};
    if (layout == Layout::kHeadsFirst) shape.push_back(params.heads);
    shape.insert(shape.end(), spatial.begin(), spatial.end());
    if (layout == Layout::kHeadsLast) shape.push_back(params.heads);
    if (channels > 0) shape.push_back(channels);
    return shape;
  }

  void check(const char* name, const Tensor& t, int64_t channels, DType dtype) const {
    const Ints expected = sizes(channels);
    STD_TORCH_CHECK(has_shape(t, expected), name, " must have shape ", listed(expected), ", got ", shape_of(t));
    const DType got = dtype_of(name, t);
    STD_TORCH_CHECK(got == dtype, name, " must be ", name_of(dtype), " for a ", name_of(params.dtype), " call, got ",
                    name_of(got));
  }

  View view(const Tensor& t) const {
    View v;
    v.data = t.data_ptr();
    v.batch = t.stride(0);
    v.head = t.stride(layout == Layout::kHeadsLast ? ndim + 1 : 1);
    for (int64_t i = 0; i < ndim; ++i) v.space[kAxes - ndim + i] = t.stride(first_axis() + i);
    return v;
  }

  Ints rpb_sizes() const {
    Ints shape{params.heads};
    for (int64_t i = kAxes - ndim; i < kAxes; ++i) shape.push_back(2 * params.axis[i].kernel_size - 1);
    return shape;
  }
  // The table in the compute type, contiguous.
  Tensor rpb(const Tensor& t) const {
    STD_TORCH_CHECK(has_shape(t, rpb_sizes()), "rpb must have one row per head and 2 K - 1 entries per axis, got ",
                    shape_of(t));
    STD_TORCH_CHECK(t.scalar_type() == wide_type(params.dtype), "rpb must be float32, or float64 for a float64 query");
    return as_contiguous(t);
  }

  // Memory from torch's allocator, to be kept until the launch returns: it is reused in the order of the stream.
  Tensor workspace(const Tensor& model, int64_t bytes) {
    if (bytes == 0) return Tensor();
    Tensor memory = new_tensor(model, {bytes}, ScalarType::Byte);
    params.workspace = memory.data_ptr();
    return memory;
  }

 private:
  static bool has_shape(const Tensor& t, const Ints& expected) {
    bool same = t.dim() == static_cast<int64_t>(expected.size());
    for (size_t i = 0; same && i < expected.size(); ++i) same = t.size(static_cast<int64_t>(i)) == expected[i];
    return same;
  }

  static void check_axis(const Axis& axis, int64_t i, bool is_empty) {
    STD_TORCH_CHECK(axis.kernel_size >= 1 && axis.dilation >= 1 && 1 <= axis.stride && axis.stride <= axis.kernel_size,
                    "kernel_size and dilation must be at least 1 and stride between 1 and kernel_size, got ", axis.kernel_size,
                    ", ", axis.dilation, ", ", axis.stride, " on axis ", i);
    STD_TORCH_CHECK(0 <= axis.shift && axis.shift < axis.kernel_size, "shift must be between 0 and window size - 1, got ",
                    axis.shift, " on axis ", i);
    STD_TORCH_CHECK(axis.dilation <= kMostSlots, "dilation must be at most ", kMostSlots, ", got ", axis.dilation, " on axis ",
                    i);
    STD_TORCH_CHECK(is_empty || axis.kind == AxisKind::kWindow || axis.dilation <= axis.length / axis.kernel_size,
                    "kernel_size * dilation must not exceed the axis' length, got ", axis.kernel_size, " * ", axis.dilation,
                    " > ", axis.length, " on axis ", i);
  }
};

using Thirds = std::array<Tensor, 3>;

// Query, key and value in qkv [B, *, 3, h, D] over `ndim` axes: views [B, *, h, D].
// NB: torch::stable::select looks the op up by name every time, six times in a backward call.
inline Thirds unpacked(const Tensor& qkv, size_t ndim) {
  const auto axis = static_cast<int64_t>(ndim) + 1;
  STD_TORCH_CHECK(qkv.dim() == axis + 3 && qkv.size(axis) == 3, "qkv must have shape [B, ", ndim,
                  " spatial axes, 3, heads, D], got ", shape_of(qkv));
  Ints sizes;
  Ints strides;
  for (int64_t i = 0; i < qkv.dim(); ++i) {
    if (i == axis) continue;
    sizes.push_back(qkv.size(i));
    strides.push_back(qkv.stride(i));
  }
  Thirds thirds;
  for (int64_t i = 0; i < 3; ++i) {
    AtenTensorHandle handle = nullptr;
    const AOTITorchError error = aoti_torch__reinterpret_tensor(qkv.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                                strides.data(), i * qkv.stride(axis), &handle);
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "could not take query, key and value out of qkv ", shape_of(qkv));
    thirds[i] = Tensor(handle);
  }
  return thirds;
}

}  // namespace natrpb::binding
