// Launchers of the irpe kernels by storage type.

#include "natrpb/irpe.h"

#include <initializer_list>
#include <string>

#include "cuda/irpe_kernels.h"
#include "cuda/types.cuh"

namespace natrpb::cuda {

namespace {

template <class Tag>
using KernelsOf = IrpeKernels<typename Tag::Type>;

// f(Tag<T>()) with the storage type T. Kernels count positions, heads, channels and buckets in 32 bits; offsets in memory have 64.
template <class F>
Status dispatch(DType dtype, std::initializer_list<int64_t> sizes, F&& f) {
  for (const int64_t size : sizes) {
    if (size >= int64_t{1} << 31) return Status::error("CUDA kernels take sizes below 2^31, got " + std::to_string(size));
  }
  return with_storage(dtype, f);
}
template <class F>
Status dispatch(const RpeIndexParams& p, F&& f) {
  return dispatch(p.dtype, {p.batch, p.heads, p.queries, p.keys, p.index.buckets}, f);
}
template <class F>
Status dispatch(const IrpeAttentionParams& p, F&& f) {
  return dispatch(p.dtype,
                  {p.batch, p.heads, p.queries, p.keys, p.head_dim, p.value_dim, p.index_k.buckets, p.index_q.buckets,
                   p.index_t.buckets, p.index_v.buckets},
                  f);
}

}  // namespace

Status rpe_index(const RpeIndexParams& params, void* stream) {
  return dispatch(params, [&](auto tag) { return KernelsOf<decltype(tag)>::rpe_index(params, stream); });
}
Status rpe_index_transposed(const RpeIndexParams& params, void* stream) {
  return dispatch(params, [&](auto tag) { return KernelsOf<decltype(tag)>::rpe_index_transposed(params, stream); });
}

int64_t irpe_attention_backward_workspace(const IrpeAttentionParams& params) {
  return with_storage(params.dtype, [&](auto tag) { return KernelsOf<decltype(tag)>::backward_workspace(params); });
}
Status irpe_attention_forward(const IrpeAttentionParams& params, void* stream) {
  return dispatch(params, [&](auto tag) { return KernelsOf<decltype(tag)>::forward(params, stream); });
}
Status irpe_attention_backward(const IrpeAttentionParams& params, void* stream) {
  return dispatch(params, [&](auto tag) { return KernelsOf<decltype(tag)>::backward(params, stream); });
}

}  // namespace natrpb::cuda
