// L2 normalisation over a backend: tensors in, params to the backend's launchers, tensors out. Schemas are in library.cpp.
#pragma once

#include <optional>
#include <tuple>

#include "natrpb/l2_normalize.h"
#include "tensors.h"

namespace natrpb::binding {

template <class Backend>
struct L2NormalizeOps {
  using Optional = std::optional<Tensor>;

  static Tensor forward(Tensor x, Optional factor) {
    const Backend backend("x", x);
    L2NormalizeParams p = params_of(backend, x, factor);
    Tensor out = new_tensor(x, sizes_of(p), x.scalar_type());
    p.out = rows_of(out);
    finish(backend.l2_normalize(p));
    return out;
  }

  static std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor x, Optional factor) {
    const Backend backend("x", x);
    L2NormalizeParams p = params_of(backend, x, factor);
    STD_TORCH_CHECK(shape_of(dout) == shape_of(x), "dout must have x's shape ", shape_of(x), ", got ", shape_of(dout));
    STD_TORCH_CHECK(dtype_of("dout", dout) == p.dtype, "dout must be ", name_of(p.dtype), " like x");
    backend.check_device("dout", dout);
    dout = with_contiguous_channels(dout);
    p.dout = rows_of(dout);
    Tensor dx = new_tensor(x, sizes_of(p), x.scalar_type());
    p.dx = rows_of(dx);
    Tensor dfactor = new_tensor(x, {factor ? p.heads : 0}, wide_type(p.dtype));
    Tensor memory = new_tensor(x, {backend.l2_normalize_backward_workspace(p)}, ScalarType::Byte);
    if (factor) p.dfactor = dfactor.data_ptr();
    p.workspace = memory.data_ptr();
    finish(backend.l2_normalize_backward(p));
    return {dx, dfactor};
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("l2_normalize", TORCH_BOX(&L2NormalizeOps::forward));
    m.impl("l2_normalize_backward", TORCH_BOX(&L2NormalizeOps::backward));
  }

 private:
  // [B, N, h, D]
  static RowsView rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)}; }
  static Ints sizes_of(const L2NormalizeParams& p) { return {p.batch, p.rows, p.heads, p.head_dim}; }

  // NB: leaves in x and factor the tensors that the params point at.
  static L2NormalizeParams params_of(const Backend& backend, Tensor& x, Optional& factor) {
    STD_TORCH_CHECK(x.dim() == 4, "x must have shape [B, N, h, D], got ", shape_of(x));
    L2NormalizeParams p;
    p.dtype = dtype_of("x", x);
    p.batch = x.size(0);
    p.rows = x.size(1);
    p.heads = x.size(2);
    p.head_dim = x.size(3);
    x = with_contiguous_channels(x);
    p.x = rows_of(x);
    if (factor) {
      STD_TORCH_CHECK(factor->dim() == 1 && factor->size(0) == p.heads, "factor must have shape [", p.heads, "], got ",
                      shape_of(*factor));
      STD_TORCH_CHECK(factor->scalar_type() == wide_type(p.dtype), "factor must be float32, or float64 for a float64 x");
      backend.check_device("factor", *factor);
      factor = as_contiguous(*factor);
      p.factor = factor->data_ptr();
    }
    return p;
  }
};

}  // namespace natrpb::binding
