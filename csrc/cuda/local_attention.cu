// Launchers of the CUDA kernels: choose the kernels by storage type and shape.

#include "natrpb/local_attention.h"

#include "cuda/local_attention_mma.h"
#include "cuda/local_attention_rows.h"
#include "cuda/types.cuh"

namespace natrpb::cuda {

namespace {

template <class T>
struct Tag {
  using Type = T;
};

// f(Tag<T>()) with the storage type T of `dtype`
template <class F>
auto with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(Tag<double>());
    case DType::kBFloat16:
      return f(Tag<__nv_bfloat16>());
    case DType::kFloat16:
      return f(Tag<__half>());
    default:
      return f(Tag<float>());
  }
}
template <class Tag>
using RowsOf = LocalAttentionRows<typename Tag::Type>;

}  // namespace

int64_t local_attention_forward_workspace(const LocalAttentionParams& params) {
  return mma::serves_forward(params) ? mma::forward_workspace(params) : 0;
}
int64_t local_attention_backward_workspace(const LocalAttentionParams& params) {
  if (mma::serves_backward(params)) return mma::backward_workspace(params);
  return with_storage(params.dtype, [&](auto tag) { return RowsOf<decltype(tag)>::backward_workspace(params); });
}
int64_t local_bias_grad_workspace(const LocalAttentionParams& params) {
  return with_storage(params.dtype, [&](auto tag) { return RowsOf<decltype(tag)>::bias_grad_workspace(params); });
}

Status local_attention_forward(const LocalAttentionParams& params, void* stream) {
  if (mma::serves_forward(params)) return mma::forward(params, stream);
  return with_storage(params.dtype, [&](auto tag) { return RowsOf<decltype(tag)>::forward(params, stream); });
}
Status local_attention_backward(const LocalAttentionParams& params, void* stream) {
  if (mma::serves_backward(params)) return mma::backward(params, stream);
  return with_storage(params.dtype, [&](auto tag) { return RowsOf<decltype(tag)>::backward(params, stream); });
}
Status local_qk(const LocalAttentionParams& params, void* stream) {
  return with_storage(params.dtype, [&](auto tag) { return RowsOf<decltype(tag)>::qk(params, stream); });
}
Status local_av(const LocalAttentionParams& params, void* stream) {
  return with_storage(params.dtype, [&](auto tag) { return RowsOf<decltype(tag)>::av(params, stream); });
}
Status local_av_transposed(const LocalAttentionParams& params, void* stream) {
  return with_storage(params.dtype, [&](auto tag) { return RowsOf<decltype(tag)>::av_transposed(params, stream); });
}
Status local_bias_grad(const LocalAttentionParams& params, void* stream) {
  return with_storage(params.dtype, [&](auto tag) { return RowsOf<decltype(tag)>::bias_grad(params, stream); });
}

}  // namespace natrpb::cuda
