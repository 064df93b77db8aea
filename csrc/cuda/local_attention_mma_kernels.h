// The tensor-core kernels of one storage type (__half, __nv_bfloat16) and width, as the dispatch sees them.
#pragma once

#include "cuda/local_attention_mma.cuh"

namespace natrpb::cuda::mma {

// Up to this width the query pass can keep its sums of dscores in registers.
inline constexpr int kMostRegisterDim = 64;

template <class T, int kDim>
struct Kernels {
  static Status forward(const Params& p, void* stream);
  static Status query(const Params& p, void* stream);
  static Status key(const Params& p, void* stream);
};

}  // namespace natrpb::cuda::mma
