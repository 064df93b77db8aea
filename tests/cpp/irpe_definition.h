// Every launcher of natrpb/irpe.h of a back end against the definition, pair by pair in double. Buffers are exactly as large as
// the op may touch, so an address sanitizer sees each step outside; outputs and workspace start as NaN.
//
// A back end is a struct of static functions, the launchers without their last argument.
#pragma once

#include "natrpb/irpe.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "storage.h"

namespace natrpb::test {

struct IrpeCase {
  const char* name;
  int64_t batch, heads, queries, keys, head_dim, value_dim;
  int64_t on_k, on_q, on_t, on_v;  // buckets of each encoding, 0 for none
  int64_t terms;
  bool padding, mask;
};

inline double exact_sixteenth(std::mt19937& random) { return (static_cast<int>(random() % 65) - 32) / 16.0; }

// [B, h, rows, columns], heads-last or heads-first in memory, with room for `strips` tensors side by side, as in a projection.
template <DType kDType>
struct Rows {
  using S = Storage<kDType>;
  std::vector<typename S::Type> data;
  RowsView view;
  int64_t batch, heads, rows, columns;

  Rows(const IrpeCase& c, int64_t rows_, int64_t columns_, bool heads_last, int64_t strips = 1)
      : batch(c.batch), heads(c.heads), rows(rows_), columns(columns_) {
    view.head = heads_last ? columns : columns * rows;
    view.row = heads_last ? columns * heads * strips : columns;
    view.batch = columns * heads * rows * (heads_last ? strips : 1);
    // NB: as a whole number of batches of `strips` tensors, less the strips behind the first.
    data.assign(size(heads_last ? strips : 1), S::store(std::numeric_limits<double>::quiet_NaN()));
    view.data = data.data();
  }
  void randomize(std::mt19937& random) {
    for_each([&](int64_t b, int64_t h, int64_t r, int64_t c) { at(b, h, r)[c] = S::store(exact_sixteenth(random)); });
  }
  typename S::Type* at(int64_t b, int64_t h, int64_t r) { return data.data() + view.offset(b, h, r); }
  double operator()(int64_t b, int64_t h, int64_t r, int64_t c) const { return S::load(data[view.offset(b, h, r) + c]); }
  template <class F>
  void for_each(F body) const {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) body(b, h, r, c);
        }
      }
    }
  }

 private:
  int64_t size(int64_t strips) const {
    const int64_t all = columns * heads * rows * batch * strips;
    return all ? all - columns * heads * (strips - 1) : 0;
  }
};

// A sum and the sum of its terms' sizes, by which rounding errors are judged.
struct Sum {
  double value = 0, size = 0;
  void add(double term) { add(term, std::fabs(term)); }
  void add(double term, double term_size) {
    value += term;
    size += term_size;
  }
};

template <class Backend, DType kDType>
class IrpeTest {
  using S = Storage<kDType>;
  static constexpr DType kWide = kDType == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  using Tensor = Rows<kDType>;
  using WideTensor = Rows<kWide>;
  using Sums = std::vector<Sum>;

 public:
  explicit IrpeTest(const IrpeCase& c) : c_(c) {
    for (Tensor* t : {&query_, &key_, &value_, &query_rows_, &key_rows_, &dout_, &dbinned_, &x_, &y_}) t->randomize(random_);
    dlse_.randomize(random_);
    for (auto& entry : table_) entry = static_cast<typename S::Wide>(exact_sixteenth(random_));
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t k = 0; k < c.keys; ++k) padding_[b * c.keys + k] = k != c.keys / 2 && random_() % 3 == 0;
    }
    for (int64_t i = 0; i < c.queries * c.keys; ++i) mask_[i] = i < c.keys || random_() % 3 == 0;
  }

  void run() {
    attention();
    index();
  }

 private:
  std::vector<int32_t> make_map(int64_t buckets, int64_t terms) {
    std::vector<int32_t> map(buckets ? terms * c_.queries * c_.keys : 0);
    for (auto& entry : map) entry = static_cast<int32_t>(random_() % buckets);
    return map;
  }
  static BucketMap view(const std::vector<int32_t>& map, int64_t buckets, int64_t terms) {
    return {map.data(), terms, buckets};
  }

  // Calls body(bucket) for the terms of a map at (q, k).
  template <class F>
  void each_term(const BucketMap& map, int64_t q, int64_t k, F body) const {
    for (int64_t t = 0; map.buckets && t < map.terms; ++t) body(map.data[(t * c_.queries + q) * c_.keys + k]);
  }
  bool closed(int64_t b, int64_t q, int64_t k) const {
    return (c_.padding && padding_[b * c_.keys + k]) || (c_.mask && mask_[q * c_.keys + k]);
  }

  void compare(const char* what, const Tensor& ours, const Sums& expected) { compare_rows(what, ours, expected, S::kEpsilon); }
  template <class R>
  void compare_rows(const char* what, const R& ours, const Sums& expected, double epsilon) {
    ours.for_each([&](int64_t b, int64_t h, int64_t r, int64_t c) {
      const Sum& sum = expected[((b * ours.heads + h) * ours.rows + r) * ours.columns + c];
      const double error = std::fabs(ours(b, h, r, c) - sum.value);
      // One rounding of the result, which may be a subnormal half, and those of the sums.
      const double least = kDType == DType::kFloat16 ? 6e-8 : 1e-12;
      const double allowed = epsilon * (std::fabs(sum.value) + 4 * sum.size) + least;
      check(error <= allowed || ours(b, h, r, c) == sum.value, [&] {
        return std::string(c_.name) + ", " + what + "[" + std::to_string(b) + ", " + std::to_string(h) + ", " +
               std::to_string(r) + ", " + std::to_string(c) + "] = " + std::to_string(ours(b, h, r, c)) + ", expected " +
               std::to_string(sum.value);
      });
    });
  }
  void expect_ok(const Status& status) {
    check(status.ok(), [&] { return std::string(c_.name) + ": " + status.message(); });
  }

  void attention() {
    IrpeAttentionParams p;
    p.batch = c_.batch;
    p.heads = c_.heads;
    p.queries = c_.queries;
    p.keys = c_.keys;
    p.head_dim = c_.head_dim;
    p.value_dim = c_.value_dim;
    p.dtype = kDType;
    p.scale = 0.25;
    p.query = query_.view;
    p.key = key_.view;
    p.value = value_.view;
    p.query_rows = query_rows_.view;
    p.key_rows = key_rows_.view;
    p.table = table_.data();
    p.index_k = view(map_k_, c_.on_k, c_.terms);
    p.index_q = view(map_q_, c_.on_q, c_.terms);
    p.index_t = view(map_t_, c_.on_t, c_.terms);
    p.index_v = view(map_v_, c_.on_v, c_.terms);
    p.key_padding_mask = c_.padding ? padding_.data() : nullptr;
    p.attn_mask = c_.mask ? mask_.data() : nullptr;
    p.out = out_.view;
    p.lse = lse_.view;
    p.binned = binned_.view;
    expect_ok(Backend::irpe_attention_forward(p));
    p.dout = dout_.view;
    p.dlse = dlse_.view;
    if (c_.on_v) p.dbinned = dbinned_.view;
    p.dquery = dquery_.view;
    p.dkey = dkey_.view;
    p.dvalue = dvalue_.view;
    p.dquery_rows = dquery_rows_.view;
    p.dkey_rows = dkey_rows_.view;
    p.dtable = c_.on_t ? dtable_.data() : nullptr;
    std::vector<unsigned char> workspace(static_cast<size_t>(Backend::irpe_attention_backward_workspace(p)), 0xff);  // NaN
    p.workspace = workspace.data();
    expect_ok(Backend::irpe_attention_backward(p));

    expected_ = Expected(c_);
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t h = 0; h < c_.heads; ++h) {
        for (int64_t q = 0; q < c_.queries; ++q) expect_query(p, b, h, q);
      }
    }
    compare("out", out_, expected_.out);
    compare_rows("lse", lse_, expected_.lse, Storage<kWide>::kEpsilon);
    compare("binned", binned_, expected_.binned);
    compare("dquery", dquery_, expected_.dquery);
    compare("dkey", dkey_, expected_.dkey);
    compare("dvalue", dvalue_, expected_.dvalue);
    compare("dquery_rows", dquery_rows_, expected_.dquery_rows);
    compare("dkey_rows", dkey_rows_, expected_.dkey_rows);
    for (size_t i = 0; i < dtable_.size(); ++i) {
      const Sum& sum = expected_.dtable[i];
      // Its terms hold <dout, out> of an output that was rounded to the storage type.
      const double allowed = S::kEpsilon * 4 * sum.size + 1e-12;
      check(std::fabs(dtable_[i] - sum.value) <= allowed, [&] {
        return std::string(c_.name) + ", dtable[" + std::to_string(i) + "] = " + std::to_string(dtable_[i]) + ", expected " +
               std::to_string(sum.value);
      });
    }
  }

  // Adds what one query gives to all results.
  void expect_query(const IrpeAttentionParams& p, int64_t b, int64_t h, int64_t q) {
    const int64_t D = c_.head_dim, Dv = c_.value_dim, row = (b * c_.heads + h) * c_.queries + q;
    const int64_t first_key = (b * c_.heads + h) * c_.keys;
    std::vector<double> score(c_.keys), weight(c_.keys), dp(c_.keys);
    double total = 0, size = 0;
    for (int64_t k = 0; k < c_.keys; ++k) {
      for (int64_t d = 0; d < D; ++d) score[k] += p.scale * query_(b, h, q, d) * key_(b, h, k, d);
      each_term(p.index_k, q, k, [&](int32_t c) { score[k] += query_rows_(b, h, q, c); });
      each_term(p.index_q, q, k, [&](int32_t c) { score[k] += key_rows_(b, h, k, c); });
      each_term(p.index_t, q, k, [&](int32_t c) { score[k] += table_[h * c_.on_t + c]; });
      size = std::max(size, std::fabs(score[k]));
      if (!closed(b, q, k)) total += weight[k] = std::exp(score[k]);
    }
    expected_.lse[row] = {std::log(total), 1 + size};
    const double grown = 2 + size;  // an error of a score grows by its size
    double mean = 0, mean_size = 0;
    for (int64_t k = 0; k < c_.keys; ++k) {
      if (total > 0) weight[k] /= total;
      double dp_size = 0;
      for (int64_t d = 0; d < Dv; ++d) {
        const double term = dout_(b, h, q, d) * value_(b, h, k, d);
        dp[k] += term;
        dp_size += std::fabs(term);
        expected_.out[row * Dv + d].add(weight[k] * value_(b, h, k, d), grown * weight[k] * std::fabs(value_(b, h, k, d)));
      }
      each_term(p.index_v, q, k, [&](int32_t c) {
        dp[k] += dbinned_(b, h, q, c);
        dp_size += std::fabs(dbinned_(b, h, q, c));
        expected_.binned[row * c_.on_v + c].add(weight[k], grown * weight[k]);
      });
      mean += weight[k] * dp[k];
      mean_size += weight[k] * dp_size;
    }
    for (int64_t k = 0; k < c_.keys; ++k) {
      const double ds = weight[k] * (dp[k] - mean + dlse_(b, h, q, 0));
      const double ds_size = grown * weight[k] * (std::fabs(dp[k]) + mean_size + std::fabs(dlse_(b, h, q, 0)) + 1);
      for (int64_t d = 0; d < D; ++d) {
        const double x = p.scale * key_(b, h, k, d), y = p.scale * query_(b, h, q, d);
        expected_.dquery[row * D + d].add(ds * x, ds_size * std::fabs(x));
        expected_.dkey[(first_key + k) * D + d].add(ds * y, ds_size * std::fabs(y));
      }
      for (int64_t d = 0; d < Dv; ++d) {
        const double term = weight[k] * dout_(b, h, q, d);
        expected_.dvalue[(first_key + k) * Dv + d].add(term, grown * std::fabs(term));
      }
      each_term(p.index_k, q, k, [&](int32_t c) { expected_.dquery_rows[row * c_.on_k + c].add(ds, ds_size); });
      each_term(p.index_q, q, k, [&](int32_t c) { expected_.dkey_rows[(first_key + k) * c_.on_q + c].add(ds, ds_size); });
      each_term(p.index_t, q, k, [&](int32_t c) { expected_.dtable[h * c_.on_t + c].add(ds, ds_size); });
    }
  }

  void index() {
    const std::vector<int32_t> map = make_map(kIndexBuckets, 1);
    RpeIndexParams p;
    p.batch = c_.batch;
    p.heads = c_.heads;
    p.queries = c_.queries;
    p.keys = c_.keys;
    p.dtype = kDType;
    p.index = {map.data(), 1, kIndexBuckets};
    p.x = x_.view;
    p.y = spread_.view;
    expect_ok(Backend::rpe_index(p));
    p.x = summed_.view;
    p.y = y_.view;
    expect_ok(Backend::rpe_index_transposed(p));
    Sums spread(c_.batch * c_.heads * c_.queries * c_.keys), summed(c_.batch * c_.heads * c_.queries * kIndexBuckets);
    y_.for_each([&](int64_t b, int64_t h, int64_t q, int64_t k) {
      const int64_t row = (b * c_.heads + h) * c_.queries + q, bucket = map[q * c_.keys + k];
      spread[row * c_.keys + k].value = x_(b, h, q, bucket);
      summed[row * kIndexBuckets + bucket].add(y_(b, h, q, k));
    });
    compare("y of rpe_index", spread_, spread);
    compare("x of rpe_index_transposed", summed_, summed);
  }

  struct Expected {
    Sums out, lse, binned, dquery, dkey, dvalue, dquery_rows, dkey_rows, dtable;

    Expected() = default;
    explicit Expected(const IrpeCase& c) {
      const int64_t pairs = c.batch * c.heads, q = pairs * c.queries, k = pairs * c.keys;
      out.resize(q * c.value_dim);
      lse.resize(q);
      binned.resize(q * c.on_v);
      dquery.resize(q * c.head_dim);
      dkey.resize(k * c.head_dim);
      dvalue.resize(k * c.value_dim);
      dquery_rows.resize(q * c.on_k);
      dkey_rows.resize(k * c.on_q);
      dtable.resize(c.heads * c.on_t);
    }
  };

  static constexpr int64_t kIndexBuckets = 37;
  const IrpeCase c_;
  std::mt19937 random_{1};
  Tensor query_{c_, c_.queries, c_.head_dim, true, 3}, key_{c_, c_.keys, c_.head_dim, true},
      value_{c_, c_.keys, c_.value_dim, false};
  Tensor query_rows_{c_, c_.queries, c_.on_k, false}, key_rows_{c_, c_.keys, c_.on_q, true};
  std::vector<typename S::Wide> table_ = std::vector<typename S::Wide>(c_.heads * c_.on_t);
  std::vector<uint8_t> padding_ = std::vector<uint8_t>(c_.batch * c_.keys), mask_ = std::vector<uint8_t>(c_.queries * c_.keys);
  std::vector<int32_t> map_k_ = make_map(c_.on_k, c_.terms), map_q_ = make_map(c_.on_q, c_.terms),
                       map_t_ = make_map(c_.on_t, c_.terms), map_v_ = make_map(c_.on_v, c_.terms);
  Tensor out_{c_, c_.queries, c_.value_dim, true}, binned_{c_, c_.queries, c_.on_v, false};
  WideTensor lse_{c_, c_.queries, 1, true}, dlse_{c_, c_.queries, 1, true};
  Tensor dout_{c_, c_.queries, c_.value_dim, false}, dbinned_{c_, c_.queries, c_.on_v, true};
  Tensor dquery_{c_, c_.queries, c_.head_dim, true, 3}, dkey_{c_, c_.keys, c_.head_dim, true},
      dvalue_{c_, c_.keys, c_.value_dim, true};
  Tensor dquery_rows_{c_, c_.queries, c_.on_k, false}, dkey_rows_{c_, c_.keys, c_.on_q, false};
  std::vector<typename S::Wide> dtable_ = std::vector<typename S::Wide>(c_.heads * c_.on_t, NAN);
  Tensor x_{c_, c_.queries, kIndexBuckets, true}, y_{c_, c_.queries, c_.keys, false};
  Tensor spread_{c_, c_.queries, c_.keys, true}, summed_{c_, c_.queries, kIndexBuckets, false};
  Expected expected_;
};

// Runs all cases in all storage types.
template <class Backend>
void test_irpe() {
  const std::vector<IrpeCase> cases = {
      // name, B, h, Nq, Nk, D, Dv, buckets on k, q, t, v, terms, padding, mask
      {"one pair", 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, false, false},
      {"no encoding", 2, 3, 19, 19, 16, 16, 0, 0, 0, 0, 1, false, false},
      {"on k", 1, 2, 18, 33, 8, 8, 50, 0, 0, 0, 1, false, false},
      {"on q", 1, 2, 33, 18, 8, 24, 0, 50, 0, 0, 1, false, false},
      {"bias", 1, 2, 17, 17, 8, 8, 0, 0, 31, 0, 1, false, false},
      {"on v", 1, 2, 17, 31, 8, 8, 0, 0, 0, 65, 1, false, false},
      {"all", 2, 2, 20, 21, 33, 5, 50, 33, 7, 64, 1, false, false},
      {"all, two terms, masks", 3, 2, 21, 20, 7, 9, 9, 70, 12, 130, 2, true, true},
      {"more buckets than registers hold", 1, 1, 17, 18, 4, 4, 129, 170, 200, 129, 1, true, false},
      {"several windows and chunks", 1, 2, 101, 300, 16, 16, 20, 20, 20, 20, 1, true, true},
      {"queries without keys", 1, 1, 3, 9, 4, 4, 3, 3, 3, 3, 1, false, true},
      {"no keys", 1, 2, 3, 0, 4, 4, 3, 3, 3, 3, 1, false, false},
      {"no queries", 1, 2, 0, 3, 4, 4, 3, 3, 3, 3, 1, false, false},
      {"empty batch", 0, 2, 3, 3, 4, 4, 3, 3, 3, 3, 1, false, false},
      {"as many pairs as lanes and more", 5, 4, 5, 40, 4, 4, 3, 3, 3, 3, 1, false, false},
  };
  for (const IrpeCase& c : cases) {
    IrpeTest<Backend, DType::kFloat64>(c).run();
    IrpeTest<Backend, DType::kFloat32>(c).run();
    IrpeTest<Backend, DType::kBFloat16>(c).run();
    IrpeTest<Backend, DType::kFloat16>(c).run();
  }
}

}  // namespace natrpb::test
