// Schemas of the natrpb ops. Fakes, autograd, autocast and vmap are registered from Python (natrpb/ops).
//
// The five integer lists are one attention pattern, one entry per spatial axis (geometry.h): kind 0 neighborhood, 1 causal,
// 2 window. Fused tensors are heads-last, [B, *, h, D], qkv [B, *, 3, h, D]; unfused ones heads-first, [B, h, *, D], as NATTEN has them.
// l2_normalize takes [B, N, h, D], all positions on one axis.
#include <torch/csrc/stable/library.h>

// irpe: index maps and masks are [Nq, Nk] or so, shared by batch and heads; see natrpb/reference_irpe.py.
#define NATRPB_MAPS                                                                                                 \
  "Tensor? index_k, Tensor? index_q, Tensor? index_t, Tensor? index_v, int num_buckets, Tensor? key_padding_mask, " \
  "Tensor? attn_mask"
#define NATRPB_PATTERN "int[] kernel_size, int[] stride, int[] dilation, int[] kind, int[] shift"

STABLE_TORCH_LIBRARY(natrpb, m) {
  m.def("local_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? rpb, " NATRPB_PATTERN
        ", float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "local_attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor? rpb, "
      "Tensor out, Tensor lse, " NATRPB_PATTERN
      ", float scale, bool needs_drpb) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor drpb)");
  m.def("local_attention_qkvpacked_forward(Tensor qkv, Tensor? rpb, " NATRPB_PATTERN
        ", float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "local_attention_qkvpacked_backward(Tensor dout, Tensor? dlse, Tensor qkv, Tensor? rpb, Tensor out, Tensor "
      "lse, " NATRPB_PATTERN ", float scale, bool needs_drpb) -> (Tensor dqkv, Tensor drpb)");
  m.def("local_qk(Tensor query, Tensor key, Tensor? rpb, " NATRPB_PATTERN ", float fill) -> Tensor");
  m.def("local_av(Tensor attn, Tensor value, " NATRPB_PATTERN ") -> Tensor");
  m.def("local_av_transposed(Tensor attn, Tensor x, " NATRPB_PATTERN ") -> Tensor");
  m.def("local_bias_grad(Tensor dattn, " NATRPB_PATTERN ") -> Tensor");

  m.def("l2_normalize(Tensor x, Tensor? factor) -> Tensor");
  m.def("l2_normalize_backward(Tensor dout, Tensor x, Tensor? factor) -> (Tensor dx, Tensor dfactor)");

  m.def("rpe_index(Tensor x, Tensor index) -> Tensor");
  m.def("rpe_index_transposed(Tensor y, Tensor index, int num_buckets) -> Tensor");
  m.def(
      "irpe_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? query_rows, Tensor? key_rows, "
      "Tensor? table, " NATRPB_MAPS ", float scale) -> (Tensor out, Tensor lse, Tensor binned)");
  m.def(
      "irpe_attention_backward(Tensor dout, Tensor? dlse, Tensor? dbinned, Tensor query, Tensor key, Tensor value, "
      "Tensor? query_rows, Tensor? key_rows, Tensor? table, Tensor out, Tensor lse, Tensor binned, " NATRPB_MAPS
      ", float scale) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dquery_rows, Tensor dkey_rows, Tensor dtable)");
}
