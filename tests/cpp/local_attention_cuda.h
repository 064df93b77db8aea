// The CUDA launchers as a back end of local_attention_definition.h.
#pragma once

#include "local_attention_definition.h"

namespace natrpb::test {

struct Cuda {
  static constexpr bool kReadsOut = true;
  static int64_t local_attention_forward_workspace(const LocalAttentionParams& p) {
    return cuda::local_attention_forward_workspace(p);
  }
  static int64_t local_attention_backward_workspace(const LocalAttentionParams& p) {
    return cuda::local_attention_backward_workspace(p);
  }
  static int64_t local_bias_grad_workspace(const LocalAttentionParams& p) { return cuda::local_bias_grad_workspace(p); }
  static bool local_attention_backward_is_wide(const LocalAttentionParams&) { return false; }
  static bool local_av_transposed_is_wide(const LocalAttentionParams&) { return false; }
  static Status local_attention_forward(const LocalAttentionParams& p) { return cuda::local_attention_forward(p, nullptr); }
  static Status local_attention_backward(const LocalAttentionParams& p) { return cuda::local_attention_backward(p, nullptr); }
  static Status local_qk(const LocalAttentionParams& p) { return cuda::local_qk(p, nullptr); }
  static Status local_av(const LocalAttentionParams& p) { return cuda::local_av(p, nullptr); }
  static Status local_av_transposed(const LocalAttentionParams& p) { return cuda::local_av_transposed(p, nullptr); }
  static Status local_bias_grad(const LocalAttentionParams& p) { return cuda::local_bias_grad(p, nullptr); }
};

}  // namespace natrpb::test
