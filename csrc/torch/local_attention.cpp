// Binds the CPU launchers of local attention to torch: tensors in, LocalAttentionParams out.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "natrpb/local_attention.h"

namespace {

using natrpb::Axis;
using natrpb::AxisKind;
using natrpb::DType;
using natrpb::kAxes;
using natrpb::LocalAttentionParams;
using natrpb::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

enum class Layout { kHeadsLast, kHeadsFirst };  // [B, *, h, D] or [B, h, *, D]

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}
ScalarType compute_type(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

// Kernels read contiguous channels; any other stride is theirs to follow.
Tensor with_contiguous_channels(const Tensor& t) {
  return t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1 ? torch::stable::contiguous(t) : t;
}

// What every op shares: the pattern, the sizes and the storage type, taken from one [B, *, h, channels] tensor.
struct Call {
  LocalAttentionParams params;
  int64_t ndim;
  Layout layout;
  Ints spatial;

  Call(const char* name, const Tensor& model, Layout layout_, const Ints& kernel_size, const Ints& stride, const Ints& dilation,
       const Ints& kind, const Ints& shift)
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
    constexpr int64_t kMostSlots = int64_t{1} << 31;  // sizes of scratch memory stay far below overflow
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
      STD_TORCH_CHECK(axis.kernel_size >= 1 && axis.dilation >= 1 && 1 <= axis.stride && axis.stride <= axis.kernel_size,
                      "kernel_size and dilation must be at least 1 and stride between 1 and kernel_size, got ",
                      axis.kernel_size, ", ", axis.dilation, ", ", axis.stride, " on axis ", i);
      const bool window = axis.kind == AxisKind::kWindow;
      STD_TORCH_CHECK(0 <= axis.shift && axis.shift < axis.kernel_size, "shift must be between 0 and window size - 1, got ",
                      axis.shift, " on axis ", i);
      STD_TORCH_CHECK(model.numel() == 0 || window || axis.kernel_size * axis.dilation <= axis.length,
                      "kernel_size * dilation must not exceed the axis' length, got ", axis.kernel_size, " * ", axis.dilation,
                      " > ", axis.length, " on axis ", i);
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
    bool same = t.dim() == static_cast<int64_t>(expected.size());
    for (size_t i = 0; same && i < expected.size(); ++i) same = t.size(static_cast<int64_t>(i)) == expected[i];
    std::string wanted;
    for (int64_t n : expected) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
    STD_TORCH_CHECK(same, name, " must have shape [", wanted, "], got ", shape_of(t));
    STD_TORCH_CHECK(dtype_of(name, t) == dtype, name, " has the wrong dtype");
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU like the other tensors");
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
    const Ints expected = rpb_sizes();
    bool same = t.dim() == static_cast<int64_t>(expected.size());
    for (size_t i = 0; same && i < expected.size(); ++i) same = t.size(static_cast<int64_t>(i)) == expected[i];
    STD_TORCH_CHECK(same, "rpb must have one row per head and 2 K - 1 entries per axis, got ", shape_of(t));
    STD_TORCH_CHECK(t.scalar_type() == compute_type(params.dtype), "rpb must be float32, or float64 for a float64 query");
    return torch::stable::contiguous(t);
  }
  Tensor empty(const Tensor& model, const Ints& shape, ScalarType dtype) const {
    return torch::stable::new_empty(model, shape, dtype);
  }
  Tensor workspace(const Tensor& model, int64_t bytes) {
    Tensor memory = empty(model, {bytes}, ScalarType::Byte);
    params.workspace = memory.data_ptr();
    return memory;
  }
};

void parallel_for(int64_t count, void* body, void (*call)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { call(body, begin, end); });
}

Tensor rounded(const Tensor& sums, const Tensor& model) {
  return sums.scalar_type() == model.scalar_type() ? sums : torch::stable::to(sums, model.scalar_type());
}

void finish(const natrpb::Status& status) { STD_TORCH_CHECK(status.ok(), status.message()); }

std::tuple<Tensor, Tensor> local_attention_forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> rpb,
                                                   Ints kernel_size, Ints stride, Ints dilation, Ints kind, Ints shift,
                                                   double scale) {
  Call call("query", query, Layout::kHeadsLast, kernel_size, stride, dilation, kind, shift);
  LocalAttentionParams& p = call.params;
  p.head_dim = query.size(query.dim() - 1);
  p.value_dim = value.size(value.dim() - 1);
  p.scale = scale;
  call.check("query", query, p.head_dim, p.dtype);
  call.check("key", key, p.head_dim, p.dtype);
  call.check("value", value, p.value_dim, p.dtype);
  query = with_contiguous_channels(query);
  key = with_contiguous_channels(key);
  value = with_contiguous_channels(value);
  p.query = call.view(query);
  p.key = call.view(key);
  p.value = call.view(value);
  std::optional<Tensor> table;
  if (rpb) p.rpb = table.emplace(call.rpb(*rpb)).data_ptr();
  Tensor out = call.empty(query, call.sizes(p.value_dim), query.scalar_type());
  Tensor lse = call.empty(query, call.sizes(0), compute_type(p.dtype));
  p.out = call.view(out);
  p.lse = call.view(lse);
  finish(natrpb::cpu::local_attention_forward(p, parallel_for));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> local_attention_backward(Tensor dout, std::optional<Tensor> dlse, Tensor query,
                                                                    Tensor key, Tensor value, std::optional<Tensor> rpb,
                                                                    Tensor lse, Ints kernel_size, Ints stride, Ints dilation,
                                                                    Ints kind, Ints shift, double scale) {
  Call call("query", query, Layout::kHeadsLast, kernel_size, stride, dilation, kind, shift);
  LocalAttentionParams& p = call.params;
  p.head_dim = query.size(query.dim() - 1);
  p.value_dim = value.size(value.dim() - 1);
  p.scale = scale;
  const DType wide = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  call.check("query", query, p.head_dim, p.dtype);
  call.check("key", key, p.head_dim, p.dtype);
  call.check("value", value, p.value_dim, p.dtype);
  call.check("dout", dout, p.value_dim, p.dtype);
  call.check("lse", lse, 0, wide);
  if (dlse) call.check("dlse", *dlse, 0, wide);
  query = with_contiguous_channels(query);
  key = with_contiguous_channels(key);
  value = with_contiguous_channels(value);
  dout = with_contiguous_channels(dout);
  p.query = call.view(query);
  p.key = call.view(key);
  p.value = call.view(value);
  p.dout = call.view(dout);
  p.lse = call.view(lse);
  if (dlse) p.dlse = call.view(*dlse);
  Tensor dquery = call.empty(query, call.sizes(p.head_dim), query.scalar_type());
  const ScalarType sums = natrpb::cpu::local_attention_backward_is_wide(p) ? ScalarType::Float : query.scalar_type();
  Tensor dkey = call.empty(query, call.sizes(p.head_dim), sums);
  Tensor dvalue = call.empty(query, call.sizes(p.value_dim), sums);
  p.dquery = call.view(dquery);
  p.dkey = call.view(dkey);
  p.dvalue = call.view(dvalue);
  std::optional<Tensor> table;
  Tensor drpb = call.empty(query, rpb ? call.rpb_sizes() : Ints{0}, compute_type(p.dtype));
  if (rpb) {
    p.rpb = table.emplace(call.rpb(*rpb)).data_ptr();
    p.drpb = drpb.data_ptr();
  }
  const Tensor memory = call.workspace(query, natrpb::cpu::local_attention_backward_workspace(p));
  finish(natrpb::cpu::local_attention_backward(p, parallel_for));
  return {dquery, rounded(dkey, query), rounded(dvalue, query), drpb};
}

Tensor local_qk(Tensor query, Tensor key, std::optional<Tensor> rpb, Ints kernel_size, Ints stride, Ints dilation, Ints kind,
                Ints shift, double fill) {
  Call call("query", query, Layout::kHeadsFirst, kernel_size, stride, dilation, kind, shift);
  LocalAttentionParams& p = call.params;
  p.head_dim = query.size(query.dim() - 1);
  call.check("query", query, p.head_dim, p.dtype);
  call.check("key", key, p.head_dim, p.dtype);
  query = with_contiguous_channels(query);
  key = with_contiguous_channels(key);
  p.query = call.view(query);
  p.key = call.view(key);
  std::optional<Tensor> table;
  if (rpb) p.rpb = table.emplace(call.rpb(*rpb)).data_ptr();
  Tensor attn = call.empty(query, call.sizes(call.slots()), query.scalar_type());
  p.attn = call.view(attn);
  p.fill = fill;
  finish(natrpb::cpu::local_qk(p, parallel_for));
  return attn;
}

Tensor local_av(Tensor attn, Tensor value, Ints kernel_size, Ints stride, Ints dilation, Ints kind, Ints shift) {
  Call call("value", value, Layout::kHeadsFirst, kernel_size, stride, dilation, kind, shift);
  LocalAttentionParams& p = call.params;
  p.value_dim = value.size(value.dim() - 1);
  call.check("value", value, p.value_dim, p.dtype);
  call.check("attn", attn, call.slots(), p.dtype);
  attn = with_contiguous_channels(attn);
  value = with_contiguous_channels(value);
  p.attn = call.view(attn);
  p.value = call.view(value);
  Tensor out = call.empty(value, call.sizes(p.value_dim), value.scalar_type());
  p.out = call.view(out);
  finish(natrpb::cpu::local_av(p, parallel_for));
  return out;
}

Tensor local_av_transposed(Tensor attn, Tensor x, Ints kernel_size, Ints stride, Ints dilation, Ints kind, Ints shift) {
  Call call("x", x, Layout::kHeadsFirst, kernel_size, stride, dilation, kind, shift);
  LocalAttentionParams& p = call.params;
  p.value_dim = x.size(x.dim() - 1);
  call.check("x", x, p.value_dim, p.dtype);
  call.check("attn", attn, call.slots(), p.dtype);
  attn = with_contiguous_channels(attn);
  x = with_contiguous_channels(x);
  p.attn = call.view(attn);
  p.dout = call.view(x);
  const ScalarType sums = natrpb::cpu::local_av_transposed_is_wide(p) ? ScalarType::Float : x.scalar_type();
  Tensor out = call.empty(x, call.sizes(p.value_dim), sums);
  p.dvalue = call.view(out);
  finish(natrpb::cpu::local_av_transposed(p, parallel_for));
  return rounded(out, x);
}

Tensor local_bias_grad(Tensor dattn, Ints kernel_size, Ints stride, Ints dilation, Ints kind, Ints shift) {
  Call call("dattn", dattn, Layout::kHeadsFirst, kernel_size, stride, dilation, kind, shift);
  LocalAttentionParams& p = call.params;
  call.check("dattn", dattn, call.slots(), p.dtype);
  dattn = with_contiguous_channels(dattn);
  p.attn = call.view(dattn);
  Tensor drpb = call.empty(dattn, call.rpb_sizes(), compute_type(p.dtype));
  p.drpb = drpb.data_ptr();
  const Tensor memory = call.workspace(dattn, natrpb::cpu::local_bias_grad_workspace(p));
  finish(natrpb::cpu::local_bias_grad(p, parallel_for));
  return drpb;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(natrpb, CPU, m) {
  m.impl("local_attention_forward", TORCH_BOX(&local_attention_forward));
  m.impl("local_attention_backward", TORCH_BOX(&local_attention_backward));
  m.impl("local_qk", TORCH_BOX(&local_qk));
  m.impl("local_av", TORCH_BOX(&local_av));
  m.impl("local_av_transposed", TORCH_BOX(&local_av_transposed));
  m.impl("local_bias_grad", TORCH_BOX(&local_bias_grad));
}
