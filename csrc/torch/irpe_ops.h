// The ops of image relative position encodings over a backend: tensors in, params to the backend's launchers, tensors out.
// Schemas are in library.cpp.
#pragma once

#include <optional>
#include <tuple>

#include "natrpb/irpe.h"
#include "torch/tensors.h"

namespace natrpb::binding {

inline std::string sizes_text(const Ints& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& t, const Ints& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(same, name, " must have shape ", sizes_text(sizes), ", got ", shape_of(t));
}

template <class Backend>
struct IrpeOps {
  using Optional = std::optional<Tensor>;
  using Params = IrpeAttentionParams;

  static Tensor index(Tensor x, Tensor index) {
    const Backend backend("x", x);
    STD_TORCH_CHECK(x.dim() == 4, "x must have shape [B, h, Nq, C], got ", shape_of(x));
    STD_TORCH_CHECK(index.dim() == 2, "index must have shape [Nq, Nk], got ", shape_of(index));
    RpeIndexParams p = index_params(x, index.size(1));
    index = take_map(backend, "index", "index", index, p.queries, p.keys, x.size(3), p.index);
    x = with_contiguous_channels(x);
    Tensor y = new_tensor(x, {p.batch, p.heads, p.queries, p.keys}, x.scalar_type());
    p.x = rows_of(x);
    p.y = rows_of(y);
    finish(backend.rpe_index(p));
    return y;
  }

  static Tensor index_transposed(Tensor y, Tensor index, int64_t num_buckets) {
    const Backend backend("y", y);
    STD_TORCH_CHECK(y.dim() == 4, "y must have shape [B, h, Nq, Nk], got ", shape_of(y));
    STD_TORCH_CHECK(index.dim() == 2, "index must have shape [Nq, Nk], got ", shape_of(index));
    STD_TORCH_CHECK(num_buckets >= 0, "num_buckets must not be negative, got ", num_buckets);
    RpeIndexParams p = index_params(y, y.size(3));
    index = take_map(backend, "index", "index", index, p.queries, p.keys, num_buckets, p.index);
    y = with_contiguous_channels(y);
    Tensor x = new_tensor(y, {p.batch, p.heads, p.queries, num_buckets}, y.scalar_type());
    p.x = rows_of(x);
    p.y = rows_of(y);
    finish(backend.rpe_index_transposed(p));
    return x;
  }

  // Everything that both passes of the attention take, checked and kept.
  struct Call {
    const Backend backend;
    Params params;
    Tensor query, key, value;
    Optional query_rows, key_rows, table, index_k, index_q, index_t, index_v, key_padding_mask, attn_mask;

    Call(Tensor query_, Tensor key_, Tensor value_, Optional query_rows_, Optional key_rows_, Optional table_,
         Optional index_k_, Optional index_q_, Optional index_t_, Optional index_v_, int64_t num_buckets,
         Optional key_padding_mask_, Optional attn_mask_, double scale)
        : backend("query", query_) {
      Params& p = params;
      for (const auto& [name, t] : {std::pair{"query", &query_}, {"key", &key_}, {"value", &value_}}) {
        STD_TORCH_CHECK(t->dim() == 4, name, " must have shape [B, N, h, D], got ", shape_of(*t));
      }
      p.dtype = dtype_of("query", query_);
      p.batch = query_.size(0);
      p.queries = query_.size(1);
      p.heads = query_.size(2);
      p.head_dim = query_.size(3);
      p.keys = key_.size(1);
      p.value_dim = value_.size(3);
      p.scale = scale;
      query = take("query", query_, per_query(p.head_dim), true, p.query);
      key = take("key", key_, per_key(p.head_dim), true, p.key);
      value = take("value", value_, per_key(p.value_dim), true, p.value);
      if (both("query_rows", query_rows_, "index_k", index_k_)) {
        query_rows = take("query_rows", *query_rows_, query_buckets(last(*query_rows_)), false, p.query_rows);
        index_k = take_map(backend, "index_k", "key_index", *index_k_, p.queries, p.keys, last(*query_rows_), p.index_k);
      }
      if (both("key_rows", key_rows_, "index_q", index_q_)) {
        key_rows = take("key_rows", *key_rows_, {p.batch, p.heads, p.keys, last(*key_rows_)}, false, p.key_rows);
        index_q = take_map(backend, "index_q", "query_index", *index_q_, p.queries, p.keys, last(*key_rows_), p.index_q);
      }
      if (both("table", table_, "index_t", index_t_)) {
        check_shape("table", *table_, {p.heads, last(*table_)});
        STD_TORCH_CHECK(table_->scalar_type() == wide_type(p.dtype), "table must be float32, or float64 for a float64 query");
        backend.check_device("table", *table_);
        table = as_contiguous(*table_);
        p.table = table->data_ptr();
        index_t = take_map(backend, "index_t", "bias_index", *index_t_, p.queries, p.keys, last(*table_), p.index_t);
      }
      if (index_v_) {
        STD_TORCH_CHECK(num_buckets >= 1, "num_buckets must be positive, got ", num_buckets);
        index_v = take_map(backend, "index_v", "value_index", *index_v_, p.queries, p.keys, num_buckets, p.index_v);
      }
      if (key_padding_mask_) {
        key_padding_mask = take_mask("key_padding_mask", *key_padding_mask_, {p.batch, p.keys}, p.key_padding_mask);
      }
      if (attn_mask_) attn_mask = take_mask("attn_mask", *attn_mask_, {p.queries, p.keys}, p.attn_mask);
    }

    Ints per_query(int64_t channels) const { return {params.batch, params.queries, params.heads, channels}; }
    Ints per_key(int64_t channels) const { return {params.batch, params.keys, params.heads, channels}; }
    Ints query_buckets(int64_t buckets) const { return {params.batch, params.heads, params.queries, buckets}; }
    static int64_t last(const Tensor& t) { return t.dim() ? t.size(t.dim() - 1) : 0; }

    static bool both(const char* one, const Optional& a, const char* other, const Optional& b) {
      STD_TORCH_CHECK(a.has_value() == b.has_value(), one, " and ", other, " must be given together");
      return a.has_value();
    }

    // Checks a tensor of the call's dtype, gives it contiguous channels, and points `to` at it. NB: it must outlive `to`.
    Tensor take(const char* name, const Tensor& t, const Ints& sizes, bool heads_last, RowsView& to) const {
      check_shape(name, t, sizes);
      STD_TORCH_CHECK(dtype_of(name, t) == params.dtype, name, " must have query's dtype");
      backend.check_device(name, t);
      Tensor taken = with_contiguous_channels(t);
      to = heads_last ? rows_of_heads_last(taken) : rows_of(taken);
      return taken;
    }
    Tensor take_mask(const char* name, const Tensor& t, const Ints& sizes, const uint8_t*& to) const {
      check_shape(name, t, sizes);
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Bool, name, " must be bool");
      backend.check_device(name, t);
      Tensor taken = as_contiguous(t);
      to = static_cast<const uint8_t*>(taken.data_ptr());
      return taken;
    }
    // [B, Nq, h] in the wide dtype
    void take_per_query(const char* name, const Tensor& t, RowsView& to) const {
      check_shape(name, t, {params.batch, params.queries, params.heads});
      STD_TORCH_CHECK(t.scalar_type() == wide_type(params.dtype), name, " must be float32, or float64 for a float64 query");
      backend.check_device(name, t);
      to = rows_of_heads_last(t);
    }
    Tensor make(const Ints& sizes, bool heads_last, RowsView& to) const {
      Tensor t = new_tensor(query, sizes, query.scalar_type());
      to = heads_last ? rows_of_heads_last(t) : rows_of(t);
      return t;
    }
    Tensor none() const { return new_tensor(query, {0}, query.scalar_type()); }
  };

  static std::tuple<Tensor, Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, Optional query_rows,
                                                    Optional key_rows, Optional table, Optional index_k, Optional index_q,
                                                    Optional index_t, Optional index_v, int64_t num_buckets,
                                                    Optional key_padding_mask, Optional attn_mask, double scale) {
    Call call(query, key, value, query_rows, key_rows, table, index_k, index_q, index_t, index_v, num_buckets, key_padding_mask,
              attn_mask, scale);
    Params& p = call.params;
    Tensor out = call.make(call.per_query(p.value_dim), true, p.out);
    Tensor lse = new_tensor(query, {p.batch, p.queries, p.heads}, wide_type(p.dtype));
    p.lse = rows_of_heads_last(lse);
    Tensor binned = call.index_v ? call.make(call.query_buckets(num_buckets), false, p.binned) : call.none();
    finish(call.backend.irpe_attention_forward(p));
    return {out, lse, binned};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      Tensor dout, Optional dlse, Optional dbinned, Tensor query, Tensor key, Tensor value, Optional query_rows,
      Optional key_rows, Optional table, Tensor out, Tensor lse, Tensor binned, Optional index_k, Optional index_q,
      Optional index_t, Optional index_v, int64_t num_buckets, Optional key_padding_mask, Optional attn_mask, double scale) {
    Call call(query, key, value, query_rows, key_rows, table, index_k, index_q, index_t, index_v, num_buckets, key_padding_mask,
              attn_mask, scale);
    Params& p = call.params;
    dout = call.take("dout", dout, call.per_query(p.value_dim), true, p.dout);
    out = call.take("out", out, call.per_query(p.value_dim), true, p.out);
    call.take_per_query("lse", lse, p.lse);
    if (dlse) call.take_per_query("dlse", *dlse, p.dlse);
    if (dbinned) {
      STD_TORCH_CHECK(call.index_v.has_value(), "dbinned must be given with index_v only");
      dbinned = call.take("dbinned", *dbinned, call.query_buckets(num_buckets), false, p.dbinned);
      binned = call.take("binned", binned, call.query_buckets(num_buckets), false, p.binned);
    }
    Tensor dquery = call.make(call.per_query(p.head_dim), true, p.dquery);
    Tensor dkey = call.make(call.per_key(p.head_dim), true, p.dkey);
    Tensor dvalue = call.make(call.per_key(p.value_dim), true, p.dvalue);
    Tensor dquery_rows = query_rows ? call.make(call.query_buckets(p.index_k.buckets), false, p.dquery_rows) : call.none();
    Tensor dkey_rows = key_rows ? call.make({p.batch, p.heads, p.keys, p.index_q.buckets}, false, p.dkey_rows) : call.none();
    Tensor dtable = new_tensor(query, table ? Ints{p.heads, p.index_t.buckets} : Ints{0}, wide_type(p.dtype));
    if (table) p.dtable = dtable.data_ptr();
    Tensor memory = new_tensor(query, {call.backend.irpe_attention_backward_workspace(p)}, ScalarType::Byte);
    p.workspace = memory.data_ptr();
    finish(call.backend.irpe_attention_backward(p));
    return {dquery, dkey, dvalue, dquery_rows, dkey_rows, dtable};
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("rpe_index", TORCH_BOX(&IrpeOps::index));
    m.impl("rpe_index_transposed", TORCH_BOX(&IrpeOps::index_transposed));
    m.impl("irpe_attention_forward", TORCH_BOX(&IrpeOps::forward));
    m.impl("irpe_attention_backward", TORCH_BOX(&IrpeOps::backward));
  }

 private:
  // [B, h, N, columns] and [B, N, h(, columns)]
  static RowsView rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
  static RowsView rows_of_heads_last(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)}; }

  static RpeIndexParams index_params(const Tensor& rows, int64_t keys) {
    RpeIndexParams p;
    p.dtype = dtype_of("x", rows);
    p.batch = rows.size(0);
    p.heads = rows.size(1);
    p.queries = rows.size(2);
    p.keys = keys;
    return p;
  }

  // A bucket map [Nq, Nk] or [T, Nq, Nk] as contiguous int32, and `to` pointing at it. NB: the tensor must outlive `to`. Nobody looks
  // at entries before the op does, so what is wrong with them is told of the argument of natrpb.irpe_attention.
  static Tensor take_map(const Backend& backend, const char* name, const char* argument, const Tensor& index, int64_t queries,
                         int64_t keys, int64_t buckets, BucketMap& to) {
    const bool several = index.dim() == 3;
    check_shape(name, index, several ? Ints{index.size(0), queries, keys} : Ints{queries, keys});
    const ScalarType type = index.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64");
    backend.check_device(name, index);
    Tensor taken = as_contiguous(index);
    backend.check_map(argument, taken, buckets);
    if (type == ScalarType::Long) taken = torch::stable::to(taken, ScalarType::Int);
    to = {static_cast<const int32_t*>(taken.data_ptr()), several ? index.size(0) : 1, buckets};
    return taken;
  }
};

}  // namespace natrpb::binding
