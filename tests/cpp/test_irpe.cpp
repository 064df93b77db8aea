// Every CPU launcher of natrpb/irpe.h against the definition (irpe_definition.h). CTest runs this once for each instruction set
// (NATRPB_ISA).
#include <thread>

#include "irpe_definition.h"

namespace {

using namespace natrpb;

void on_two_threads(int64_t count, void* body, void (*call)(void*, int64_t, int64_t)) {
  std::thread other([&] { call(body, count / 2, count); });
  call(body, 0, count / 2);
  other.join();
}

struct Cpu {
  static Status rpe_index(const RpeIndexParams& p) { return cpu::rpe_index(p, on_two_threads); }
  static Status rpe_index_transposed(const RpeIndexParams& p) { return cpu::rpe_index_transposed(p, on_two_threads); }
  static int64_t irpe_attention_backward_workspace(const IrpeAttentionParams& p) {
    return cpu::irpe_attention_backward_workspace(p);
  }
  static Status irpe_attention_forward(const IrpeAttentionParams& p) { return cpu::irpe_attention_forward(p, on_two_threads); }
  static Status irpe_attention_backward(const IrpeAttentionParams& p) {
    return cpu::irpe_attention_backward(p, on_two_threads);
  }
};

}  // namespace

int main() {
  test::test_irpe<Cpu>();
  return test::finish("irpe");
}
