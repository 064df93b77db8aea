// Every CUDA launcher against the definition (local_attention_definition.h). Built with the emulator, so the kernels' own
// source runs here, also under sanitizers.

#include "far_rows.h"
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

// All launchers on fp16 rows `stride` elements apart in `memory`: the elements of all results.
std::vector<uint16_t> results_at_stride(uint16_t* memory, int64_t stride) {
  constexpr int64_t kRows = 3, kChannels = 8;
  using Half = Storage<DType::kFloat16>;
  LocalAttentionParams p;
  p.axis[2] = neighborhood(kRows, kRows);
  p.batch = p.heads = 1;
  p.head_dim = p.value_dim = kChannels;
  p.dtype = DType::kFloat16;
  const std::vector<View*> inputs = {&p.query, &p.key, &p.value, &p.dout};
  const std::vector<View*> outputs = {&p.out, &p.dquery, &p.dkey, &p.dvalue, &p.attn};
  const auto row = [&](const View& view, int64_t i) { return static_cast<uint16_t*>(view.data) + i * stride; };
  const auto place = [&](View* view) {
    view->data = memory;
    view->space[2] = stride;
    memory += kChannels;
  };
  for (View* view : inputs) place(view);
  for (View* view : outputs) place(view);
  std::mt19937 random(7);
  for (View* view : inputs) {
    for (int64_t i = 0; i < kRows * kChannels; ++i) {
      row(*view, i / kChannels)[i % kChannels] = Half::store((static_cast<int>(random() % 65) - 32) / 16.0);
    }
  }
  std::vector<float> lse(kRows), drpb(2 * kRows - 1);
  std::vector<char> workspace(1 << 16);
  p.lse.data = lse.data();
  p.lse.space[2] = 1;
  p.drpb = drpb.data();
  p.workspace = workspace.data();
  std::vector<uint16_t> results;
  const auto collect = [&](const Status& status, const std::vector<View*>& views) {
    check(status.ok(), [&] { return status.message(); });
    for (View* view : views) {
      for (int64_t i = 0; i < kRows; ++i) results.insert(results.end(), row(*view, i), row(*view, i) + kChannels);
    }
    for (float x : drpb) results.push_back(Half::store(x));
  };
  collect(Cuda::local_attention_forward(p), {&p.out});
  collect(Cuda::local_attention_backward(p), {&p.dquery, &p.dkey, &p.dvalue});
  collect(Cuda::local_qk(p), {&p.attn});
  collect(Cuda::local_av(p), {&p.out});
  collect(Cuda::local_av_transposed(p), {&p.dvalue});
  collect(Cuda::local_bias_grad(p), {});
  return results;
}

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
      {"heads of several parts", {one, one, neighborhood(9, 3)}, 1, 1, 72, 136, true},
      {"tables beyond shared memory", {one, window(5, 30, 0), window(6, 29, 4)}, 1, 2, 8, 8, true},
      {"empty batch", {one, one, neighborhood(6, 3)}, 0, 2, 8, 8, true},
  };
  test_dtype<Cuda, DType::kFloat64>(cases, {Layout::kHeadsLast});
  test_dtype<Cuda, DType::kFloat32>(cases, {Layout::kPacked});
  test_dtype<Cuda, DType::kBFloat16>(cases, {Layout::kHeadsFirst});
  test_dtype<Cuda, DType::kFloat16>(cases, {Layout::kPacked});
  const std::vector<Case> long_case = {{"several rows per warp", {one, one, neighborhood(10300, 2)}, 1, 1, 4, 4, true}};
  test_dtype<Cuda, DType::kFloat32>(long_case, {Layout::kHeadsLast});
  test_offsets_beyond_32_bits(results_at_stride);
  return finish("cuda");
}
