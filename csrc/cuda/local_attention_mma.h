// The tensor-core path of local attention: fp16 and bf16, head_dim and value_dim multiples of 8 up to 128.
#pragma once

#include "natrpb/local_attention.h"

namespace natrpb::cuda::mma {

// Whether these kernels take the op: dtype and head sizes as above, rows of all tensors aligned to 16 bytes, a positive scale
// by which a bias can be divided, and tables of fragments that stay small.
bool serves_forward(const LocalAttentionParams& params);
bool serves_backward(const LocalAttentionParams& params);

int64_t forward_workspace(const LocalAttentionParams& params);
int64_t backward_workspace(const LocalAttentionParams& params);

Status forward(const LocalAttentionParams& params, void* stream);
Status backward(const LocalAttentionParams& params, void* stream);

}  // namespace natrpb::cuda::mma
