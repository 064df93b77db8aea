// Every CUDA launcher against the definition (local_attention_definition.h). Built with the emulator, so the kernels' own source
// runs here, also under sanitizers.
#include "local_attention_definition.h"

namespace {

using namespace natrpb;
using namespace natrpb::test;

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

}  // namespace

int main() {
  const Axis one = neighborhood(1, 1);
  const std::vector<Case> cases = {
      {"single position", {one, one, one}, 1, 1, 1, 1, true},
      {"1-D, L = K", {one, one, neighborhood(5, 5)}, 2, 3, 8, 8, true},
      {"1-D, L = K + 1, even", {one, one, neighborhood(5, 4)}, 1, 2, 5, 3, true},
      {"1-D, more keys than a chunk", {one, one, neighborhood(70, 35)}, 1, 1, 16, 16, true},
      {"1-D, dilated, ragged groups", {one, one, neighborhood(37, 5, 1, 3)}, 1, 2, 24, 32, true},
      {"1-D, causal and strided", {one, one, causal(23, 6, 4)}, 2, 2, 9, 17, true},
      {"2-D, L = 2K - 1 and 2K", {one, neighborhood(5, 3), neighborhood(8, 4)}, 1, 2, 32, 32, true},
      {"2-D, no bias", {one, neighborhood(8, 7), neighborhood(9, 7)}, 1, 1, 32, 40, false},
      {"2-D, strided and dilated", {one, neighborhood(9, 4, 3, 2), neighborhood(11, 3, 2, 3)}, 1, 1, 7, 24, true},
      {"2-D, causal rows", {one, causal(6, 3), neighborhood(9, 5)}, 2, 1, 24, 8, true},
      {"2-D, shifted windows", {one, window(10, 4, 3), window(9, 4, 1)}, 1, 2, 32, 32, true},
      {"2-D, windows larger than the input", {one, window(5, 8, 0), window(6, 8, 4)}, 1, 1, 16, 16, true},
      {"3-D", {neighborhood(4, 3), neighborhood(5, 3), neighborhood(4, 3)}, 1, 2, 16, 16, true},
      {"3-D, mixed", {causal(3, 2), neighborhood(6, 3, 2, 2), window(5, 4, 1)}, 1, 1, 33, 5, true},
      {"heads wider than a pass", {one, one, neighborhood(9, 3)}, 1, 1, 160, 136, true},
      {"table beyond shared memory", {one, one, neighborhood(801, 401)}, 1, 1, 1, 1, true},
      {"empty batch", {one, one, neighborhood(6, 3)}, 0, 2, 8, 8, true},
  };
  test_dtype<Cuda, DType::kFloat64>(cases, {Layout::kHeadsLast});
  test_dtype<Cuda, DType::kFloat32>(cases, {Layout::kPacked});
  test_dtype<Cuda, DType::kBFloat16>(cases, {Layout::kHeadsFirst});
  test_dtype<Cuda, DType::kFloat16>(cases, {Layout::kPacked});
  return finish("cuda");
}
