// Launchers of the tensor-core kernels of one storage type and width, instantiated in local_attention_mma_*.cu.
#pragma once

#include "cuda/local_attention_mma_forward.cuh"
#include "cuda/local_attention_mma_kernels.h"
#include "cuda/local_attention_mma_key.cuh"
#include "cuda/local_attention_mma_query.cuh"

namespace natrpb::cuda::mma {

// Bytes of the halo's two tensors.
template <int kDim>
int64_t halo_bytes(const Tiling& tiling) {
  return int64_t{2} * 2 * kDim * tiling.positions;
}

template <class T, int kDim>
Status Kernels<T, kDim>::forward(const Params& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.op.batch * p.op.heads * p.tiling.ctas));
  return launch(forward_kernel<T, kDim>, grid, 32 * p.tiling.warps, sizeof(CtaState) + halo_bytes<kDim>(p.tiling), stream, p);
}

template <class T, int kDim>
Status Kernels<T, kDim>::query(const Params& p, void* stream) {
  const int64_t sums = p.partials && !p.sums ? p.tiling.pairs * kPairFloat4 * static_cast<int64_t>(sizeof(float4)) : 0;
  const int64_t bytes = sizeof(CtaState) + p.tiling.warps * (sizeof(WarpState) + sums) + halo_bytes<kDim>(p.tiling);
  const dim3 grid(static_cast<unsigned>(p.op.heads * p.runs));
  if constexpr (kDim <= kMostRegisterDim) {
    if (p.sums_in_registers) return launch(query_kernel<T, kDim, true>, grid, 32 * p.tiling.warps, bytes, stream, p);
  }
  return launch(query_kernel<T, kDim, false>, grid, 32 * p.tiling.warps, bytes, stream, p);
}

template <class T, int kDim>
Status Kernels<T, kDim>::key(const Params& p, void* stream) {
  const int64_t stats = p.tiling.warps * kChunkColumns * static_cast<int64_t>(sizeof(float2));
  const dim3 grid(static_cast<unsigned>(p.op.batch * p.op.heads * p.tiling.ctas));
  return launch(key_kernel<T, kDim>, grid, 32 * p.tiling.warps, sizeof(CtaState) + stats + halo_bytes<kDim>(p.tiling), stream,
                p);
}

}  // namespace natrpb::cuda::mma
