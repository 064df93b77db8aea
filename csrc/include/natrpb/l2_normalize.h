// Parameters and launchers of the rows of unit length that make scores cosines (Liu et al. 2022, eq. 2).
//
//   out(r) = factor[head] * x_r / |x_r|      for the rows r of every head; a row of zeros stays one, with no gradient
//   dx(r)  = factor[head] / |x_r| * (dout_r - u_r <u_r, dout_r>),  u_r = x_r / |x_r|;      dfactor[head] = sum_r <u_r, dout_r>
#pragma once

#include <cstdint>

#include "natrpb/local_attention.h"
#include "natrpb/status.h"

namespace natrpb {

struct L2NormalizeParams {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t rows = 0;      // N, of one batch entry and head
  int64_t head_dim = 0;  // D
  DType dtype = DType::kFloat32;

  RowsView x;                    // [B, h, N, D]
  const void* factor = nullptr;  // [h] contiguous, fp32 (fp64 for fp64), nullptr for 1
  RowsView out;                  // [B, h, N, D]

  RowsView dout;              // [B, h, N, D]
  RowsView dx;                // [B, h, N, D]
  void* dfactor = nullptr;    // as factor, nullptr where it is
  void* workspace = nullptr;  // see the *_workspace functions, may be nullptr where they return 0
};

namespace cpu {

// Bytes of params.workspace; a function of the shapes, never of threads.
int64_t l2_normalize_backward_workspace(const L2NormalizeParams& params);

// x, factor -> out
Status l2_normalize(const L2NormalizeParams& params, ParallelFor parallel_for);
// x, factor, dout -> dx, dfactor
Status l2_normalize_backward(const L2NormalizeParams& params, ParallelFor parallel_for);

}  // namespace cpu

namespace cuda {

// The same on `stream` (a cudaStream_t of the current device).
int64_t l2_normalize_backward_workspace(const L2NormalizeParams& params);
Status l2_normalize(const L2NormalizeParams& params, void* stream);
Status l2_normalize_backward(const L2NormalizeParams& params, void* stream);

}  // namespace cuda
}  // namespace natrpb
