// The local-attention ops over a backend: tensors in, LocalAttentionParams to the backend's launchers, tensors out.
// Schemas are in library.cpp.
#pragma once

#include <optional>
#include <tuple>

#include "local_attention_call.h"

namespace natrpb::binding {

template <class Backend>
struct LocalAttentionOps {
  using Call = LocalAttentionCall;
  using Params = LocalAttentionParams;

  static std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> rpb, Ints kernel_size,
                                            Ints stride, Ints dilation, Ints kind, Ints shift, double scale) {
    const Backend backend("query", query);
    Call call("query", query, Layout::kHeadsLast, kernel_size, stride, dilation, kind, shift);
    Params& p = call.params;
    p.scale = scale;
    take_inputs(backend, call, query, key, value);
    const std::optional<Tensor> table = take_rpb(backend, call, rpb);
    Tensor out = new_tensor(query, call.sizes(p.value_dim), query.scalar_type());
    Tensor lse = new_tensor(query, call.sizes(0), wide_type(p.dtype));
    p.out = call.view(out);
    p.lse = call.view(lse);
    const Tensor memory = call.workspace(query, backend.local_attention_forward_workspace(p));
    finish(backend.local_attention_forward(p));
    return {out, lse};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, std::optional<Tensor> dlse, Tensor query, Tensor key,
                                                             Tensor value, std::optional<Tensor> rpb, Tensor out, Tensor lse,
                                                             Ints kernel_size, Ints stride, Ints dilation, Ints kind,
                                                             Ints shift, double scale, bool needs_drpb) {
    Thirds gradients;
    Tensor drpb = differentiate(dout, dlse, {query, key, value}, rpb, out, lse, kernel_size, stride, dilation, kind, shift,
                                scale, needs_drpb, gradients);
    return {gradients[0], gradients[1], gradients[2], drpb};
  }

  static std::tuple<Tensor, Tensor> qkvpacked_forward(Tensor qkv, std::optional<Tensor> rpb, Ints kernel_size, Ints stride,
                                                      Ints dilation, Ints kind, Ints shift, double scale) {
    auto [query, key, value] = unpacked(qkv, kernel_size.size());
    return forward(query, key, value, rpb, kernel_size, stride, dilation, kind, shift, scale);
  }

  // The gradients of query, key and value are written where dqkv has them; sums in fp32 are rounded into it.
  static std::tuple<Tensor, Tensor> qkvpacked_backward(Tensor dout, std::optional<Tensor> dlse, Tensor qkv,
                                                       std::optional<Tensor> rpb, Tensor out, Tensor lse, Ints kernel_size,
                                                       Ints stride, Ints dilation, Ints kind, Ints shift, double scale,
                                                       bool needs_drpb) {
    const Thirds inputs = unpacked(qkv, kernel_size.size());
    Tensor dqkv = new_tensor(qkv, Ints(qkv.sizes().begin(), qkv.sizes().end()), qkv.scalar_type());
    Thirds gradients = unpacked(dqkv, kernel_size.size());
    Tensor drpb = differentiate(dout, dlse, inputs, rpb, out, lse, kernel_size, stride, dilation, kind, shift, scale,
                                needs_drpb, gradients);
    return {dqkv, drpb};
  }

  static Tensor qk(Tensor query, Tensor key, std::optional<Tensor> rpb, Ints kernel_size, Ints stride, Ints dilation, Ints kind,
                   Ints shift, double fill) {
    const Backend backend("query", query);
    Call call("query", query, Layout::kHeadsFirst, kernel_size, stride, dilation, kind, shift);
    Params& p = call.params;
    p.fill = fill;
    p.head_dim = query.size(query.dim() - 1);
    p.query = take(backend, call, "query", query, p.head_dim);
    p.key = take(backend, call, "key", key, p.head_dim);
    const std::optional<Tensor> table = take_rpb(backend, call, rpb);
    Tensor attn = new_tensor(query, call.sizes(call.slots()), query.scalar_type());
    p.attn = call.view(attn);
    finish(backend.local_qk(p));
    return attn;
  }

  static Tensor av(Tensor attn, Tensor value, Ints kernel_size, Ints stride, Ints dilation, Ints kind, Ints shift) {
    const Backend backend("value", value);
    Call call("value", value, Layout::kHeadsFirst, kernel_size, stride, dilation, kind, shift);
    Params& p = call.params;
    p.value_dim = value.size(value.dim() - 1);
    p.value = take(backend, call, "value", value, p.value_dim);
    p.attn = take(backend, call, "attn", attn, call.slots());
    Tensor out = new_tensor(value, call.sizes(p.value_dim), value.scalar_type());
    p.out = call.view(out);
    finish(backend.local_av(p));
    return out;
  }

  static Tensor av_transposed(Tensor attn, Tensor x, Ints kernel_size, Ints stride, Ints dilation, Ints kind, Ints shift) {
    const Backend backend("x", x);
    Call call("x", x, Layout::kHeadsFirst, kernel_size, stride, dilation, kind, shift);
    Params& p = call.params;
    p.value_dim = x.size(x.dim() - 1);
    p.dout = take(backend, call, "x", x, p.value_dim);
    p.attn = take(backend, call, "attn", attn, call.slots());
    const ScalarType sums = backend.local_av_transposed_is_wide(p) ? ScalarType::Float : x.scalar_type();
    Tensor out = new_tensor(x, call.sizes(p.value_dim), sums);
    p.dvalue = call.view(out);
    finish(backend.local_av_transposed(p));
    return rounded(out, x);
  }

  static Tensor bias_grad(Tensor dattn, Ints kernel_size, Ints stride, Ints dilation, Ints kind, Ints shift) {
    const Backend backend("dattn", dattn);
    Call call("dattn", dattn, Layout::kHeadsFirst, kernel_size, stride, dilation, kind, shift);
    Params& p = call.params;
    p.attn = take(backend, call, "dattn", dattn, call.slots());
    Tensor drpb = new_tensor(dattn, call.rpb_sizes(), wide_type(p.dtype));
    p.drpb = drpb.data_ptr();
    const Tensor memory = call.workspace(dattn, backend.local_bias_grad_workspace(p));
    finish(backend.local_bias_grad(p));
    return drpb;
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("local_attention_forward", TORCH_BOX(&LocalAttentionOps::forward));
    m.impl("local_attention_backward", TORCH_BOX(&LocalAttentionOps::backward));
    m.impl("local_attention_qkvpacked_forward", TORCH_BOX(&LocalAttentionOps::qkvpacked_forward));
    m.impl("local_attention_qkvpacked_backward", TORCH_BOX(&LocalAttentionOps::qkvpacked_backward));
    m.impl("local_qk", TORCH_BOX(&LocalAttentionOps::qk));
    m.impl("local_av", TORCH_BOX(&LocalAttentionOps::av));
    m.impl("local_av_transposed", TORCH_BOX(&LocalAttentionOps::av_transposed));
    m.impl("local_bias_grad", TORCH_BOX(&LocalAttentionOps::bias_grad));
  }

 private:
  // The gradients of query, key and value into tensors of their shapes, made where undefined; returns the table's.
  static Tensor differentiate(Tensor& dout, const std::optional<Tensor>& dlse, Thirds inputs, const std::optional<Tensor>& rpb,
                              Tensor& out, const Tensor& lse, const Ints& kernel_size, const Ints& stride, const Ints& dilation,
                              const Ints& kind, const Ints& shift, double scale, bool needs_drpb, Thirds& gradients) {
    auto& [query, key, value] = inputs;
    const Backend backend("query", query);
    Call call("query", query, Layout::kHeadsLast, kernel_size, stride, dilation, kind, shift);
    Params& p = call.params;
    p.scale = scale;
    take_inputs(backend, call, query, key, value);
    p.dout = take(backend, call, "dout", dout, p.value_dim);
    p.out = take(backend, call, "out", out, p.value_dim);
    p.lse = take_per_query(backend, call, "lse", lse);
    if (dlse) p.dlse = take_per_query(backend, call, "dlse", *dlse);
    STD_TORCH_CHECK(rpb || !needs_drpb, "needs_drpb must be false without rpb, got true");
    const std::optional<Tensor> table = take_rpb(backend, call, rpb);
    const ScalarType dtype = query.scalar_type();
    const ScalarType sums = backend.local_attention_backward_is_wide(p) ? ScalarType::Float : dtype;
    const auto written = [&](const Tensor& gradient, int64_t channels, ScalarType type) {
      return gradient.defined() && type == dtype ? gradient : new_tensor(query, call.sizes(channels), type);
    };
    const Tensor dquery = written(gradients[0], p.head_dim, dtype);
    const Tensor dkey = written(gradients[1], p.head_dim, sums);
    const Tensor dvalue = written(gradients[2], p.value_dim, sums);
    Tensor drpb = new_tensor(query, needs_drpb ? call.rpb_sizes() : Ints{0}, wide_type(p.dtype));
    p.dquery = call.view(dquery);
    p.dkey = call.view(dkey);
    p.dvalue = call.view(dvalue);
    if (needs_drpb) p.drpb = drpb.data_ptr();
    const Tensor memory = call.workspace(query, backend.local_attention_backward_workspace(p));
    finish(backend.local_attention_backward(p));
    const auto keep = [&](const Tensor& result, Tensor& gradient) {
      if (!gradient.defined()) {
        gradient = rounded(result, query);
      } else if (sums != dtype) {
        torch::stable::copy_(gradient, result);
      }
    };
    gradients[0] = dquery;
    keep(dkey, gradients[1]);
    keep(dvalue, gradients[2]);
    return drpb;
  }

  // Checks a tensor of `channels`, gives it contiguous channels, and returns its view. NB: the tensor must outlive the view.
  static View take(const Backend& backend, const Call& call, const char* name, Tensor& t, int64_t channels) {
    call.check(name, t, channels, call.params.dtype);
    backend.check_device(name, t);
    t = with_contiguous_channels(t);
    return call.view(t);
  }

  static View take_per_query(const Backend& backend, const Call& call, const char* name, const Tensor& t) {
    call.check(name, t, 0, wide(call.params.dtype));
    backend.check_device(name, t);
    return call.view(t);
  }

  static void take_inputs(const Backend& backend, Call& call, Tensor& query, Tensor& key, Tensor& value) {
    Params& p = call.params;
    p.head_dim = query.size(query.dim() - 1);
    p.value_dim = value.size(value.dim() - 1);
    p.query = take(backend, call, "query", query, p.head_dim);
    p.key = take(backend, call, "key", key, p.head_dim);
    p.value = take(backend, call, "value", value, p.value_dim);
  }

  // The table that params.rpb now points to; it must be kept until the launch.
  static std::optional<Tensor> take_rpb(const Backend& backend, Call& call, const std::optional<Tensor>& rpb) {
    if (!rpb) return std::nullopt;
    backend.check_device("rpb", *rpb);
    const Tensor table = call.rpb(*rpb);
    call.params.rpb = table.data_ptr();
    return table;
  }
};

}  // namespace natrpb::binding
