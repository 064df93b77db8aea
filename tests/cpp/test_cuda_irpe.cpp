// Every CUDA launcher of natrpb/irpe.h against the definition (irpe_definition.h). Built with the emulator, so the kernels' own
// source runs here, also under sanitizers.
#include "irpe_definition.h"

namespace {

using namespace natrpb;

struct Cuda {
  static Status rpe_index(const RpeIndexParams& p) { return cuda::rpe_index(p, nullptr); }
  static Status rpe_index_transposed(const RpeIndexParams& p) { return cuda::rpe_index_transposed(p, nullptr); }
  static int64_t irpe_attention_backward_workspace(const IrpeAttentionParams& p) {
    return cuda::irpe_attention_backward_workspace(p);
  }
  static Status irpe_attention_forward(const IrpeAttentionParams& p) { return cuda::irpe_attention_forward(p, nullptr); }
  static Status irpe_attention_backward(const IrpeAttentionParams& p) { return cuda::irpe_attention_backward(p, nullptr); }
};

}  // namespace

int main() {
  test::test_irpe<Cuda>();
  return test::finish("cuda irpe");
}
