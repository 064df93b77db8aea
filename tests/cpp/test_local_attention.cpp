// Every CPU launcher against the definition (local_attention_definition.h). CTest runs this once for each instruction set
// (NATRPB_ISA).
#include <thread>

#include "cpu/isa.h"
#include "local_attention_definition.h"

namespace {

using namespace natrpb;
using namespace natrpb::test;

void on_two_threads(int64_t count, void* body, void (*call)(void*, int64_t, int64_t)) {
  std::thread other([&] { call(body, count / 2, count); });
  call(body, 0, count / 2);
  other.join();
}

struct Cpu {
  static constexpr bool kReadsOut = false;
  static int64_t local_attention_forward_workspace(const LocalAttentionParams&) { return 0; }
  static int64_t local_attention_backward_workspace(const LocalAttentionParams& p) {
    return cpu::local_attention_backward_workspace(p);
  }
  static int64_t local_bias_grad_workspace(const LocalAttentionParams& p) { return cpu::local_bias_grad_workspace(p); }
  static bool local_attention_backward_is_wide(const LocalAttentionParams& p) {
    return cpu::local_attention_backward_is_wide(p);
  }
  static bool local_av_transposed_is_wide(const LocalAttentionParams& p) { return cpu::local_av_transposed_is_wide(p); }
  static Status local_attention_forward(const LocalAttentionParams& p) {
    return cpu::local_attention_forward(p, on_two_threads);
  }
  static Status local_attention_backward(const LocalAttentionParams& p) {
    return cpu::local_attention_backward(p, on_two_threads);
  }
  static Status local_qk(const LocalAttentionParams& p) { return cpu::local_qk(p, on_two_threads); }
  static Status local_av(const LocalAttentionParams& p) { return cpu::local_av(p, on_two_threads); }
  static Status local_av_transposed(const LocalAttentionParams& p) { return cpu::local_av_transposed(p, on_two_threads); }
  static Status local_bias_grad(const LocalAttentionParams& p) { return cpu::local_bias_grad(p, on_two_threads); }
};

}  // namespace

int main() {
  const Axis one = neighborhood(1, 1);
  const std::vector<Case> cases = {
      {"single position", {one, one, one}, 1, 1, 1, 1, true},
      {"1-D, L = K", {one, one, neighborhood(5, 5)}, 2, 3, 8, 8, true},
      {"1-D, L = K + 1, even", {one, one, neighborhood(5, 4)}, 1, 2, 5, 3, true},
      {"1-D, longer than a box", {one, one, neighborhood(131, 13)}, 1, 1, 16, 16, true},
      {"1-D, dilated, ragged groups", {one, one, neighborhood(37, 5, 1, 3)}, 1, 2, 32, 32, true},
      {"1-D, causal and strided", {one, one, causal(23, 6, 4)}, 2, 2, 9, 17, true},
      {"2-D, K = 7, prime sizes", {one, neighborhood(11, 7), neighborhood(17, 7)}, 1, 2, 32, 32, true},
      {"2-D, K = 7, no bias", {one, neighborhood(14, 7), neighborhood(14, 7)}, 1, 1, 32, 40, false},
      {"2-D, strided and dilated", {one, neighborhood(13, 4, 3, 2), neighborhood(19, 5, 2, 3)}, 1, 1, 7, 24, true},
      {"2-D, causal rows", {one, causal(9, 3), neighborhood(21, 5)}, 2, 1, 24, 8, true},
      {"2-D, shifted windows", {one, window(10, 7, 3), window(18, 7, 5)}, 1, 2, 32, 32, true},
      {"2-D, windows larger than the input", {one, window(5, 8, 0), window(6, 8, 4)}, 1, 1, 16, 16, true},
      {"2-D, windows of three parts", {one, window(12, 12, 0), window(29, 11, 4)}, 1, 1, 34, 18, true},
      {"2-D, windows of a position more than whole vectors", {one, window(8, 5, 3), window(26, 13, 0)}, 1, 2, 22, 34, true},
      {"2-D, windows without bias", {one, window(9, 4, 2), window(9, 5, 0)}, 1, 2, 16, 48, false},
      {"2-D, dilated windows", {one, window(15, 4, 1, 2), window(17, 7, 3, 3)}, 2, 1, 8, 6, true},
      {"2-D, neighborhoods of the whole map", {one, neighborhood(7, 7), neighborhood(5, 5)}, 2, 3, 32, 32, true},
      {"1-D windows", {one, one, window(70, 33, 5)}, 1, 2, 40, 24, true},
      {"3-D windows", {window(5, 4, 1), window(7, 3, 2), window(4, 4, 0)}, 1, 2, 20, 32, true},
      {"3-D", {neighborhood(4, 3), neighborhood(5, 3), neighborhood(7, 3)}, 1, 2, 12, 12, true},
      {"2-D, few slots", {one, neighborhood(9, 3), neighborhood(35, 3)}, 1, 2, 32, 16, true},
      {"2-D, few slots, strided", {one, neighborhood(8, 2, 2), neighborhood(21, 5, 3, 2)}, 1, 1, 16, 16, false},
      {"2-D, few slots, far rows", {one, neighborhood(8, 3), neighborhood(7, 3)}, 1, 8, 16, 16, true},
      {"3-D, mixed", {causal(3, 2), neighborhood(8, 3, 2, 2), window(9, 4, 1)}, 1, 1, 33, 5, true},
      {"wide head", {one, one, neighborhood(19, 3)}, 1, 1, 130, 96, true},
      {"empty batch", {one, one, neighborhood(6, 3)}, 0, 2, 8, 8, true},
  };
  const std::vector<Layout> layouts = {Layout::kHeadsLast, Layout::kHeadsFirst, Layout::kPacked};
  test_dtype<Cpu, DType::kFloat64>(cases, layouts);
  test_dtype<Cpu, DType::kFloat32>(cases, layouts);
  test_dtype<Cpu, DType::kBFloat16>(cases, layouts);
  test_dtype<Cpu, DType::kFloat16>(cases, layouts);
  // More than 1 MiB: what is upcoming is asked for meanwhile.
  const std::vector<Case> large = {
      {"streamed, dilated", {one, neighborhood(68, 3, 1, 3), neighborhood(130, 3)}, 1, 1, 36, 32, true},
      {"streamed, few slots", {one, one, neighborhood(2501, 7)}, 1, 1, 32, 32, true},
      {"streamed, small windows", {one, window(67, 4, 1), window(50, 3, 2)}, 2, 1, 32, 32, true},
      {"streamed, windows", {window(3, 2, 1), window(67, 3, 1), window(50, 4, 2)}, 1, 1, 30, 32, true},
  };
  test_dtype<Cpu, DType::kFloat32>(large, {Layout::kPacked});
  test_dtype<Cpu, DType::kBFloat16>(large, {Layout::kPacked});
  return natrpb::test::finish(natrpb::cpu::isa_name(natrpb::cpu::active_isa()));
}
