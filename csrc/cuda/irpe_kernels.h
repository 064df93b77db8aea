// Kernels of image relative position encodings: launchers of one storage type T (double, float, __half, __nv_bfloat16),
// instantiated in irpe_*.cu.
#pragma once

#include "natrpb/irpe.h"

namespace natrpb::cuda {

template <class T>
struct IrpeKernels {
  static Status rpe_index(const RpeIndexParams& params, void* stream);
  static Status rpe_index_transposed(const RpeIndexParams& params, void* stream);

  static int64_t backward_workspace(const IrpeAttentionParams& params);
  static Status forward(const IrpeAttentionParams& params, void* stream);
  static Status backward(const IrpeAttentionParams& params, void* stream);
};

}  // namespace natrpb::cuda
