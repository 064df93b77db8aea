// Parameters and launchers of local attention: neighborhood, causal and windowed patterns, fused and unfused.
//
//   score(q,k) = scale * <query_q, key_k> + rpb[head, k - q + K - 1]     for the keys of q on every axis (geometry.h)
//   out(q)     = sum_k softmax_k(score) value_k,    lse(q) = log sum_k exp(score)
//
// One set of structs serves one to three spatial axes: missing leading axes have length 1 and kernel size 1.
#pragma once

#include <cstdint>

#include "natrpb/geometry.h"
#include "natrpb/status.h"

namespace natrpb {

inline constexpr int kAxes = 3;

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// A tensor [batch, heads, axis 0, axis 1, axis 2, channel] with free strides in elements; channels are contiguous.
struct View {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t space[kAxes] = {0, 0, 0};

  NATRPB_HD int64_t offset(int64_t b, int64_t h, const int64_t* position) const {
    return b * batch + h * head + position[0] * space[0] + position[1] * space[1] + position[2] * space[2];
  }
};

// A tensor [batch, heads, row, channel] with free strides in elements; channels are contiguous.
struct RowsView {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;

  NATRPB_HD int64_t offset(int64_t b, int64_t h, int64_t r) const { return b * batch + h * head + r * row; }
};

struct LocalAttentionParams {
  Axis axis[kAxes];
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;   // D, channels of query and key
  int64_t value_dim = 0;  // Dv, channels of value and out
  DType dtype = DType::kFloat32;
  double scale = 1.0;

  View query;                 // [B, h, *, D]
  View key;                   // [B, h, *, D]
  View value;                 // [B, h, *, Dv]
  const void* rpb = nullptr;  // [h, 2 K_0 - 1, 2 K_1 - 1, 2 K_2 - 1] contiguous, fp32 (fp64 for fp64), may be nullptr
  View out;                   // [B, h, *, Dv]; read by the CUDA backward, which takes sum_k p_k <dout, value_k> from it
  View lse;                   // [B, h, *, 1], fp32 (fp64 for fp64)
  View attn;                  // [B, h, *, K_0 K_1 K_2], unfused ops only
  double fill = 0.0;          // what local_qk writes where a slot holds no key

  View dout;                  // [B, h, *, Dv]
  View dlse;                  // [B, h, *, 1], fp32 (fp64 for fp64), data may be nullptr
  View dquery;                // [B, h, *, D]
  View dkey;                  // [B, h, *, D]
  View dvalue;                // [B, h, *, Dv]
  void* drpb = nullptr;       // as rpb, may be nullptr
  void* workspace = nullptr;  // see the *_workspace functions, may be nullptr where they return 0
};

namespace cpu {

// Runs call(body, begin, end) over disjoint ranges that cover [0, count), on any threads; returns when all are done.
using ParallelFor = void (*)(int64_t count, void* body, void (*call)(void* body, int64_t begin, int64_t end));

// Bytes of params.workspace for the ops that sum bias gradients; a function of the shapes, never of threads.
int64_t local_attention_backward_workspace(const LocalAttentionParams& params);
int64_t local_bias_grad_workspace(const LocalAttentionParams& params);

// Whether dkey and dvalue must be fp32 tensors although params.dtype is a 16-bit type: parts of their sums meet in memory.
bool local_attention_backward_is_wide(const LocalAttentionParams& params);
bool local_av_transposed_is_wide(const LocalAttentionParams& params);

// query, key, value, rpb -> out, lse
Status local_attention_forward(const LocalAttentionParams& params, ParallelFor parallel_for);
// query, key, value, rpb, lse, dout, dlse -> dquery, dkey, dvalue, drpb
Status local_attention_backward(const LocalAttentionParams& params, ParallelFor parallel_for);
// query, key, rpb -> attn (scores; scale is applied to query)
Status local_qk(const LocalAttentionParams& params, ParallelFor parallel_for);
// attn, value -> out
Status local_av(const LocalAttentionParams& params, ParallelFor parallel_for);
// attn, dout -> dvalue: the transpose of local_av
Status local_av_transposed(const LocalAttentionParams& params, ParallelFor parallel_for);
// attn (its gradient) -> drpb: the transpose of adding the bias
Status local_bias_grad(const LocalAttentionParams& params, ParallelFor parallel_for);

}  // namespace cpu

namespace cuda {

// Every launcher queues its kernels on `stream` (a cudaStream_t of the current device) and returns at once. Results are the
// same bits on every run: sums that cross threads are formed in an order that depends on the shapes and the kind of GPU alone.

// Bytes of params.workspace; a function of the sizes, strides and pattern.
int64_t local_attention_forward_workspace(const LocalAttentionParams& params);
int64_t local_attention_backward_workspace(const LocalAttentionParams& params);
int64_t local_bias_grad_workspace(const LocalAttentionParams& params);

// query, key, value, rpb -> out, lse
Status local_attention_forward(const LocalAttentionParams& params, void* stream);
// query, key, value, rpb, out, lse, dout, dlse -> dquery, dkey, dvalue, drpb
Status local_attention_backward(const LocalAttentionParams& params, void* stream);
// query, key, rpb -> attn (scores; scale is applied to query)
Status local_qk(const LocalAttentionParams& params, void* stream);
// attn, value -> out
Status local_av(const LocalAttentionParams& params, void* stream);
// attn, dout -> dvalue: the transpose of local_av
Status local_av_transposed(const LocalAttentionParams& params, void* stream);
// attn (its gradient) -> drpb: the transpose of adding the bias
Status local_bias_grad(const LocalAttentionParams& params, void* stream);

}  // namespace cuda
}  // namespace natrpb
