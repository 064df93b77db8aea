// Every launcher of a back end against the definition, term by term in double. Buffers are exactly as large as the op may
// touch, so an address sanitizer sees each step outside; outputs and workspace start as NaN.
//
// A back end is a struct of static functions, the launchers of natrpb/local_attention.h without their last argument, and of
// kReadsOut: whether its backward takes sum p dp from `out`, rounded to the storage type.
#pragma once

#include "natrpb/local_attention.h"

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "storage.h"

namespace natrpb::test {

struct Case {
  const char* name;
  Axis axis[kAxes];
  int64_t batch, heads, head_dim, value_dim;
  bool rpb;

  int64_t positions() const { return axis[0].length * axis[1].length * axis[2].length; }
  int64_t slots() const { return axis[0].kernel_size * axis[1].kernel_size * axis[2].kernel_size; }
  int64_t table() const {  // entries of one head's bias table
    return (2 * axis[0].kernel_size - 1) * (2 * axis[1].kernel_size - 1) * (2 * axis[2].kernel_size - 1);
  }
};

// Calls body(position) for every position of the case's grid.
template <class F>
void each_position(const Case& c, F body) {
  int64_t p[kAxes];
  for (p[0] = 0; p[0] < c.axis[0].length; ++p[0]) {
    for (p[1] = 0; p[1] < c.axis[1].length; ++p[1]) {
      for (p[2] = 0; p[2] < c.axis[2].length; ++p[2]) body(p);
    }
  }
}

// Calls body(batch, head, position) for every row of the case's tensors.
template <class F>
void each_row(const Case& c, F body) {
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) each_position(c, [&](const int64_t* p) { body(b, h, p); });
  }
}

// In memory [B, *, h, channels], [B, h, *, channels], or heads-last as the middle third of [B, *, 3, h, channels].
enum class Layout { kHeadsLast, kHeadsFirst, kPacked };

// A tensor [B, h, *, channels].
template <DType kDType>
struct Buffer {
  using S = Storage<kDType>;
  std::vector<typename S::Type> data;
  View view;
  int64_t channels;

  Buffer(const Case& c, int64_t channels_, Layout layout) : channels(channels_) {
    int64_t stride = channels;
    if (layout != Layout::kHeadsFirst) view.head = take(stride, c.heads);
    const int64_t third = stride;
    if (layout == Layout::kPacked) stride *= 3;
    for (int axis = kAxes - 1; axis >= 0; --axis) view.space[axis] = take(stride, c.axis[axis].length);
    if (layout == Layout::kHeadsFirst) view.head = take(stride, c.heads);
    view.batch = take(stride, c.batch);
    data.assign(stride, S::store(std::numeric_limits<double>::quiet_NaN()));
    view.data = data.data() + (layout == Layout::kPacked && stride > 0 ? third : 0);
  }
  // Multiples of 1/16 between -2 and 2: every storage type holds them exactly.
  void randomize(const Case& c, std::mt19937& random) {
    each_row(c, [&](int64_t b, int64_t h, const int64_t* position) {
      for (int64_t d = 0; d < channels; ++d) {
        row(b, h, position)[d] = S::store((static_cast<int>(random() % 65) - 32) / 16.0);
      }
    });
  }
  double operator()(int64_t b, int64_t h, const int64_t* position, int64_t channel) const {
    return S::load(row(b, h, position)[channel]);
  }

 private:
  typename S::Type* row(int64_t b, int64_t h, const int64_t* position) const {
    return static_cast<typename S::Type*>(view.data) + view.offset(b, h, position);
  }
  static int64_t take(int64_t& stride, int64_t size) {
    const int64_t own = stride;
    stride *= size;
    return own;
  }
};

// Calls body(key position, slot, table entry) for every key that a query sees. The geometry has its own test.
template <class F>
void each_key(const Case& c, const int64_t* query, F body) {
  Interval keys[kAxes];
  int64_t group[kAxes], p[kAxes], k[kAxes], position[kAxes];
  for (int a = 0; a < kAxes; ++a) {
    group[a] = query[a] % c.axis[a].dilation;
    p[a] = query[a] / c.axis[a].dilation;
    keys[a] = c.axis[a].keys(p[a], c.axis[a].group_length(group[a]));
  }
  for (k[0] = keys[0].first; k[0] <= keys[0].last; ++k[0]) {
    for (k[1] = keys[1].first; k[1] <= keys[1].last; ++k[1]) {
      for (k[2] = keys[2].first; k[2] <= keys[2].last; ++k[2]) {
        int64_t slot = 0, entry = 0;
        for (int a = 0; a < kAxes; ++a) {
          slot = slot * c.axis[a].kernel_size + k[a] - keys[a].first;
          entry = entry * (2 * c.axis[a].kernel_size - 1) + c.axis[a].bias_index(p[a], k[a]);
          position[a] = c.axis[a].position(group[a], k[a]);
        }
        body(position, slot, entry);
      }
    }
  }
}

template <class Backend, DType kDType>
class Test {
  using S = Storage<kDType>;
  static constexpr DType kWide = kDType == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  using Tensor = Buffer<kDType>;
  using WideTensor = Buffer<kWide>;
  using Sums = std::vector<double>;

 public:
  Test(const Case& c, Layout layout) : c_(c), layout_(layout) {
    for (Tensor* t : {&query_, &key_, &value_, &dout_, &weights_}) t->randomize(c, random_);
    dlse_.randomize(c, random_);
    for (auto& x : rpb_) x = static_cast<typename S::Wide>((static_cast<int>(random_() % 65) - 32) / 16.0);
    params_.batch = c.batch;
    params_.heads = c.heads;
    params_.head_dim = c.head_dim;
    params_.value_dim = c.value_dim;
    params_.dtype = kDType;
    params_.scale = 0.25;
    for (int a = 0; a < kAxes; ++a) params_.axis[a] = c.axis[a];
    params_.query = query_.view;
    params_.key = key_.view;
    params_.value = value_.view;
    params_.rpb = c.rpb ? rpb_.data() : nullptr;
    params_.dout = dout_.view;
    params_.dlse = dlse_.view;
  }

  void fused() {
    Tensor out(c_, c_.value_dim, layout_);
    WideTensor lse(c_, 1, layout_);
    params_.out = out.view;
    params_.lse = lse.view;
    const std::vector<char> memory = make_workspace(Backend::local_attention_forward_workspace(params_));
    succeeds(Backend::local_attention_forward(params_));

    Sums wout = sums(c_.value_dim), wlse = sums(1);
    Gradients want{sums(c_.head_dim), sums(c_.head_dim), sums(c_.value_dim), Sums(rpb_.size(), 0.0)};
    each_row(c_, [&](int64_t b, int64_t h, const int64_t* q) {
      double total = 0, delta = 0;  // delta = sum of p dp
      each_key(c_, q, [&](const int64_t* k, int64_t, int64_t entry) { total += std::exp(score(b, h, q, k, entry)); });
      each_key(c_, q, [&](const int64_t* k, int64_t, int64_t entry) {
        const double p = std::exp(score(b, h, q, k, entry)) / total;
        for (int64_t d = 0; d < c_.value_dim; ++d) {
          wout[at(b, h, q, d, c_.value_dim)] += p * value_(b, h, k, d);
          want.dvalue[at(b, h, k, d, c_.value_dim)] += p * dout_(b, h, q, d);
          delta += p * dout_(b, h, q, d) * value_(b, h, k, d);
        }
      });
      wlse[at(b, h, q, 0, 1)] = std::log(total);
      each_key(c_, q, [&](const int64_t* k, int64_t, int64_t entry) {
        double dp = dlse_(b, h, q, 0) - delta;
        for (int64_t d = 0; d < c_.value_dim; ++d) dp += dout_(b, h, q, d) * value_(b, h, k, d);
        const double ds = std::exp(score(b, h, q, k, entry)) / total * dp;
        for (int64_t d = 0; d < c_.head_dim; ++d) {
          want.dquery[at(b, h, q, d, c_.head_dim)] += params_.scale * ds * key_(b, h, k, d);
          want.dkey[at(b, h, k, d, c_.head_dim)] += params_.scale * ds * query_(b, h, q, d);
        }
        want.drpb[h * table_ + entry] += ds;
      });
    });
    compare("out", out, wout);
    compare("lse", lse, wlse);
    backward(want, c_.rpb);
    if (c_.rpb && layout_ == Layout::kHeadsFirst) backward(want, false);
  }

  void unfused() {
    Tensor attn(c_, slots_, layout_), out(c_, c_.value_dim, layout_), dvalue(c_, c_.value_dim, layout_);
    WideTensor wide_dvalue(c_, c_.value_dim, layout_);
    const bool wide = Backend::local_av_transposed_is_wide(params_);
    std::vector<typename S::Wide> drpb(rpb_.size(), NAN);
    params_.scale = 1.0;
    params_.fill = -8.0;
    params_.out = out.view;
    params_.dvalue = wide ? wide_dvalue.view : dvalue.view;
    params_.drpb = drpb.data();
    params_.attn = attn.view;
    succeeds(Backend::local_qk(params_));
    params_.attn = weights_.view;
    succeeds(Backend::local_av(params_));
    succeeds(Backend::local_av_transposed(params_));
    const std::vector<char> memory = make_workspace(Backend::local_bias_grad_workspace(params_));
    succeeds(Backend::local_bias_grad(params_));

    Sums wattn = sums(slots_), wout = sums(c_.value_dim), wdvalue = sums(c_.value_dim), wdrpb(rpb_.size(), 0.0);
    for (double& x : wattn) x = params_.fill;
    each_row(c_, [&](int64_t b, int64_t h, const int64_t* q) {
      each_key(c_, q, [&](const int64_t* k, int64_t slot, int64_t entry) {
        wattn[at(b, h, q, slot, slots_)] = score(b, h, q, k, entry);
        const double weight = weights_(b, h, q, slot);
        wdrpb[h * table_ + entry] += weight;
        for (int64_t d = 0; d < c_.value_dim; ++d) {
          wout[at(b, h, q, d, c_.value_dim)] += weight * value_(b, h, k, d);
          wdvalue[at(b, h, k, d, c_.value_dim)] += weight * dout_(b, h, q, d);
        }
      });
    });
    compare("attn", attn, wattn);
    compare("av", out, wout);
    wide ? compare("av_transposed", wide_dvalue, wdvalue) : compare("av_transposed", dvalue, wdvalue);
    compare_table("bias_grad", drpb, wdrpb, Storage<kWide>::kEpsilon);
  }

 private:
  struct Gradients {
    Sums dquery, dkey, dvalue, drpb;
  };

  // The fused backward, after the forward; of the table, too, where it learns.
  void backward(const Gradients& want, bool learns) {
    Tensor dquery(c_, c_.head_dim, layout_), dkey(c_, c_.head_dim, layout_), dvalue(c_, c_.value_dim, layout_);
    WideTensor wide_dkey(c_, c_.head_dim, layout_), wide_dvalue(c_, c_.value_dim, layout_);
    const bool wide = Backend::local_attention_backward_is_wide(params_);
    std::vector<typename S::Wide> drpb(learns ? rpb_.size() : 0, NAN);
    params_.dquery = dquery.view;
    params_.dkey = wide ? wide_dkey.view : dkey.view;
    params_.dvalue = wide ? wide_dvalue.view : dvalue.view;
    params_.drpb = learns ? drpb.data() : nullptr;
    const std::vector<char> memory = make_workspace(Backend::local_attention_backward_workspace(params_));
    succeeds(Backend::local_attention_backward(params_));
    compare("dquery", dquery, want.dquery);
    wide ? compare("dkey", wide_dkey, want.dkey) : compare("dkey", dkey, want.dkey);
    wide ? compare("dvalue", wide_dvalue, want.dvalue) : compare("dvalue", dvalue, want.dvalue);
    if (learns) compare_table("drpb", drpb, want.drpb, Backend::kReadsOut ? S::kEpsilon : Storage<kWide>::kEpsilon);
  }

  Sums sums(int64_t channels) const { return Sums(c_.batch * c_.heads * positions_ * channels, 0.0); }

  int64_t at(int64_t b, int64_t h, const int64_t* p, int64_t channel, int64_t channels) const {
    const int64_t flat = (p[0] * c_.axis[1].length + p[1]) * c_.axis[2].length + p[2];
    return ((b * c_.heads + h) * positions_ + flat) * channels + channel;
  }

  double score(int64_t b, int64_t h, const int64_t* q, const int64_t* k, int64_t entry) const {
    double dot = 0;
    for (int64_t d = 0; d < c_.head_dim; ++d) dot += query_(b, h, q, d) * key_(b, h, k, d);
    return params_.scale * dot + (c_.rpb ? rpb_[h * table_ + entry] : 0);
  }

  std::vector<char> make_workspace(int64_t bytes) {
    std::vector<char> memory(bytes, '\xff');  // every float in it is NaN
    params_.workspace = bytes ? memory.data() : nullptr;
    return memory;
  }

  std::string where(const char* what) const { return std::string(c_.name) + " " + what; }

  void succeeds(const Status& status) const {
    check(status.ok(), [&] { return where("status") + ": " + status.message(); });
  }

  void near(const char* what, double got, double want, double largest, double epsilon) const {
    check(std::fabs(got - want) <= 20 * epsilon * (1 + largest),
          [&] { return where(what) + ": expected " + std::to_string(want) + ", got " + std::to_string(got); });
  }
  static double largest_of(const Sums& want) {
    double largest = 0;
    for (double x : want) largest = std::fmax(largest, std::fabs(x));
    return largest;
  }
  template <DType kOther>
  void compare(const char* what, const Buffer<kOther>& got, const Sums& want) const {
    const double largest = largest_of(want);
    each_row(c_, [&](int64_t b, int64_t h, const int64_t* p) {
      for (int64_t d = 0; d < got.channels; ++d) {
        near(what, got(b, h, p, d), want[at(b, h, p, d, got.channels)], largest, Storage<kOther>::kEpsilon);
      }
    });
  }
  void compare_table(const char* what, const std::vector<typename S::Wide>& got, const Sums& want, double epsilon) const {
    for (size_t i = 0; i < want.size(); ++i) near(what, got[i], want[i], largest_of(want), epsilon);
  }

  const Case& c_;
  Layout layout_;
  int64_t positions_ = c_.positions(), slots_ = c_.slots(), table_ = c_.table();
  std::mt19937 random_{7};
  LocalAttentionParams params_;
  Tensor query_{c_, c_.head_dim, layout_}, key_{c_, c_.head_dim, layout_}, value_{c_, c_.value_dim, layout_},
      dout_{c_, c_.value_dim, layout_}, weights_{c_, slots_, layout_};
  WideTensor dlse_{c_, 1, layout_};
  std::vector<typename S::Wide> rpb_ = std::vector<typename S::Wide>(c_.heads * table_);
};

Axis neighborhood(int64_t length, int64_t kernel_size, int64_t stride = 1, int64_t dilation = 1) {
  return {length, kernel_size, stride, dilation, 0, AxisKind::kNeighborhood};
}
Axis causal(int64_t length, int64_t kernel_size, int64_t stride = 1, int64_t dilation = 1) {
  return {length, kernel_size, stride, dilation, 0, AxisKind::kCausal};
}
Axis window(int64_t length, int64_t size, int64_t shift, int64_t dilation = 1) {
  return {length, size, 1, dilation, shift, AxisKind::kWindow};
}

template <class Backend, DType kDType>
void test_dtype(const std::vector<Case>& cases, const std::vector<Layout>& layouts) {
  for (const Case& c : cases) {
    for (Layout layout : layouts) {
      Test<Backend, kDType>(c, layout).fused();
      Test<Backend, kDType>(c, layout).unfused();
    }
  }
}

}  // namespace natrpb::test
