// Parameters and launchers of image relative position encodings (Wu et al. 2021).
//
//   score(q,k)  = scale * <query_q, key_k> + query_rows[q, index_k(q,k)] + key_rows[k, index_q(q,k)] + table[index_t(q,k)]
//   out(q)      = sum_k p(q,k) value_k,  p = softmax_k(score);     lse(q) = log sum_k exp(score)
//   binned[q,c] = sum of p(q,k) over the k with index_v(q,k) = c
//
// for every batch entry and head. Where an index map has several terms, so has its sum. The rows of encodings are made, and
// binned weights used, outside: products with the learned tables, of size queries x buckets.
#pragma once

#include <cstdint>

#include "natrpb/local_attention.h"
#include "natrpb/status.h"

namespace natrpb {

// Buckets of every pair of positions, shared by batch and heads.
struct BucketMap {
  const int32_t* data = nullptr;  // [terms, Nq, Nk] contiguous
  int64_t terms = 0;
  int64_t buckets = 0;  // every entry is in [0, buckets); 0 where there is no such encoding
};

struct RpeIndexParams {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t queries = 0;  // Nq
  int64_t keys = 0;     // Nk
  DType dtype = DType::kFloat32;
  BucketMap index;  // one term
  RowsView x;       // [B, h, Nq, C]
  RowsView y;       // [B, h, Nq, Nk]
};

struct IrpeAttentionParams {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t queries = 0;    // Nq
  int64_t keys = 0;       // Nk
  int64_t head_dim = 0;   // D, channels of query and key
  int64_t value_dim = 0;  // Dv, channels of value and out
  DType dtype = DType::kFloat32;
  double scale = 1.0;

  RowsView query;               // [B, h, Nq, D]
  RowsView key;                 // [B, h, Nk, D]
  RowsView value;               // [B, h, Nk, Dv]
  RowsView query_rows;          // [B, h, Nq, index_k.buckets], may be nullptr, as its map
  RowsView key_rows;            // [B, h, Nk, index_q.buckets], may be nullptr, as its map
  const void* table = nullptr;  // [h, index_t.buckets] contiguous, fp32 (fp64 for fp64), may be nullptr, as its map
  BucketMap index_k;            // of the keys' encoding, looked up in query_rows
  BucketMap index_q;            // of the queries' encoding, looked up in key_rows
  BucketMap index_t;            // of the bias table
  BucketMap index_v;            // of the values' encoding, may be nullptr
  const uint8_t* key_padding_mask = nullptr;  // [B, Nk] contiguous, 1 where a key is excluded, may be nullptr
  const uint8_t* attn_mask = nullptr;         // [Nq, Nk] contiguous, 1 where a pair is excluded, may be nullptr
  RowsView out;                               // [B, h, Nq, Dv]
  RowsView lse;                               // [B, h, Nq, 1], fp32 (fp64 for fp64); -inf for a query without keys
  RowsView binned;                            // [B, h, Nq, index_v.buckets], nullptr as its map

  RowsView dout;              // [B, h, Nq, Dv]
  RowsView dlse;              // [B, h, Nq, 1], fp32 (fp64 for fp64), may be nullptr
  RowsView dbinned;           // [B, h, Nq, index_v.buckets], may be nullptr
  RowsView dquery;            // [B, h, Nq, D]
  RowsView dkey;              // [B, h, Nk, D]
  RowsView dvalue;            // [B, h, Nk, Dv]
  RowsView dquery_rows;       // as query_rows
  RowsView dkey_rows;         // as key_rows
  void* dtable = nullptr;     // as table
  void* workspace = nullptr;  // see irpe_attention_backward_workspace, may be nullptr where that returns 0
};

namespace cpu {

// x -> y[b,h,i,j] = x[b,h,i, index[i,j]]
Status rpe_index(const RpeIndexParams& params, ParallelFor parallel_for);
// y -> x[b,h,i,c] = sum of y[b,h,i,j] over the j with index[i,j] = c, in the order of j
Status rpe_index_transposed(const RpeIndexParams& params, ParallelFor parallel_for);

// Bytes of params.workspace; a function of the shapes, never of threads.
int64_t irpe_attention_backward_workspace(const IrpeAttentionParams& params);

// query, key, value, encodings, masks -> out, lse, binned
Status irpe_attention_forward(const IrpeAttentionParams& params, ParallelFor parallel_for);
// the same and out, lse, binned, dout, dlse, dbinned -> dquery, dkey, dvalue, dquery_rows, dkey_rows, dtable
Status irpe_attention_backward(const IrpeAttentionParams& params, ParallelFor parallel_for);

}  // namespace cpu

// The same on a GPU: queued on `stream`, a cudaStream_t of the current device. Nobody can look at the maps without waiting for
// the GPU: an entry outside of [0, buckets) is used for no access to memory, and its pair's score or sum is NaN. Maps are int32;
// of int64 ones the ops take the lower half.
namespace cuda {

Status rpe_index(const RpeIndexParams& params, void* stream);
// NB: sums by bucket have a fixed order, but another one.
Status rpe_index_transposed(const RpeIndexParams& params, void* stream);

int64_t irpe_attention_backward_workspace(const IrpeAttentionParams& params);

Status irpe_attention_forward(const IrpeAttentionParams& params, void* stream);
Status irpe_attention_backward(const IrpeAttentionParams& params, void* stream);

}  // namespace cuda
}  // namespace natrpb
