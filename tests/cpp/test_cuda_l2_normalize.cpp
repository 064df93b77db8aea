// The CUDA launchers of l2_normalize against the definition, in the emulator, also under sanitizers.
#include "l2_normalize_definition.h"

namespace {

using namespace natrpb;

struct Cuda {
  static int64_t l2_normalize_backward_workspace(const L2NormalizeParams& p) {
    return cuda::l2_normalize_backward_workspace(p);
  }
  static Status l2_normalize(const L2NormalizeParams& p) { return cuda::l2_normalize(p, nullptr); }
  static Status l2_normalize_backward(const L2NormalizeParams& p) { return cuda::l2_normalize_backward(p, nullptr); }
};

}  // namespace

int main() {
  test::test_l2_normalize<Cuda>();
  return test::finish("cuda");
}
