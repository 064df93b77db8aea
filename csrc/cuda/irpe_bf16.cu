#include "cuda/irpe_launch.cuh"

namespace natrpb::cuda {
template struct IrpeKernels<__nv_bfloat16>;
}
