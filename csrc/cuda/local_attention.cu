// Launchers of the CUDA kernels: choose the kernels by storage type and shape.

#include "natrpb/local_attention.h"

#include <string>

#include "cuda/local_attention_mma.h"
#include "cuda/local_attention_rows.h"
#include "cuda/types.cuh"

namespace natrpb::cuda {

namespace {

template <class Tag>
using RowsOf = LocalAttentionRows<typename Tag::Type>;

// Kernels count positions, heads and channels in 32 bits; offsets in memory have 64.
Status check(const LocalAttentionParams& params) {
  int64_t largest = max_of(max_of(params.batch, params.heads), max_of(params.head_dim, params.value_dim));
  for (const Axis& axis : params.axis) {
    largest = max_of(largest, max_of(max_of(axis.length, axis.kernel_size), axis.dilation));
  }
  if (largest < int64_t{1} << 31) return {};
  return Status::error("CUDA kernels take sizes, kernel sizes and dilations below 2^31, got " + std::to_string(largest));
}

// launch(Tag<T>()) with the storage type T, unless the sizes are out of range.
template <class F>
Status dispatch(const LocalAttentionParams& params, F&& launch) {
  const Status status = check(params);
  return status.ok() ? with_storage(params.dtype, launch) : status;
}

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
  return dispatch(params, [&](auto tag) { return RowsOf<decltype(tag)>::forward(params, stream); });
}
Status local_attention_backward(const LocalAttentionParams& params, void* stream) {
  if (mma::serves_backward(params)) return mma::backward(params, stream);
  return dispatch(params, [&](auto tag) { return RowsOf<decltype(tag)>::backward(params, stream); });
}
Status local_qk(const LocalAttentionParams& params, void* stream) {
  return dispatch(params, [&](auto tag) { return RowsOf<decltype(tag)>::qk(params, stream); });
}
Status local_av(const LocalAttentionParams& params, void* stream) {
  return dispatch(params, [&](auto tag) { return RowsOf<decltype(tag)>::av(params, stream); });
}
Status local_av_transposed(const LocalAttentionParams& params, void* stream) {
  return dispatch(params, [&](auto tag) { return RowsOf<decltype(tag)>::av_transposed(params, stream); });
}
Status local_bias_grad(const LocalAttentionParams& params, void* stream) {
  return dispatch(params, [&](auto tag) { return RowsOf<decltype(tag)>::bias_grad(params, stream); });
}

}  // namespace natrpb::cuda
