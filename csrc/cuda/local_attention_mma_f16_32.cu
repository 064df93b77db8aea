#include "cuda/local_attention_mma_launch.cuh"

template struct natrpb::cuda::mma::Kernels<__half, 32>;
