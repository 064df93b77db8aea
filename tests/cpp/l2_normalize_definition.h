// Both launchers of natrpb/l2_normalize.h of a back end against the definition in double. Buffers are exactly as large as the op
// may touch, so an address sanitizer sees each step outside; outputs and workspace start as NaN.
//
// A back end is a struct of static functions, the launchers without their last argument.
#pragma once

#include "natrpb/l2_normalize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "storage.h"

namespace natrpb::test {

struct L2Case {
  const char* name;
  int64_t batch, rows, heads, head_dim;
  bool heads_last, with_factor;
};

template <class Backend, DType kDType>
class L2Test {
 public:
  explicit L2Test(const L2Case& c) : case_(c), random_(7) {
    params_.batch = c.batch;
    params_.rows = c.rows;
    params_.heads = c.heads;
    params_.head_dim = c.head_dim;
    params_.dtype = kDType;
  }

  void run() {
    x_ = values(&params_.x, true);
    dout_ = values(&params_.dout, true);
    out_ = values(&params_.out, false);
    dx_ = values(&params_.dx, false);
    for (int64_t r = 0; r < case_.rows; r += 3) zero(r % std::max<int64_t>(case_.batch, 1), r % case_.heads, r);
    std::vector<Wide> factor(case_.heads), dfactor(case_.heads, kNan);
    for (Wide& f : factor) f = static_cast<Wide>(random_() % 64 / 4.0);
    if (case_.with_factor) {
      params_.factor = factor.data();
      params_.dfactor = dfactor.data();
    }
    std::vector<char> workspace(Backend::l2_normalize_backward_workspace(params_), static_cast<char>(0xff));
    params_.workspace = workspace.data();
    finish_launch(Backend::l2_normalize(params_));
    finish_launch(Backend::l2_normalize_backward(params_));
    for (int64_t h = 0; h < case_.heads; ++h) {
      double sum = 0, size = 1;
      for (int64_t b = 0; b < case_.batch; ++b) {
        for (int64_t r = 0; r < case_.rows; ++r) {
          const double along = check_row(b, h, r, case_.with_factor ? factor[h] : 1);
          sum += along;
          size += std::abs(along);
        }
      }
      if (case_.with_factor) expect("dfactor", dfactor[h], sum, 1e-6 * size);
    }
  }

 private:
  using S = Storage<kDType>;
  using Wide = typename S::Wide;
  static constexpr Wide kNan = std::numeric_limits<Wide>::quiet_NaN();

  std::vector<typename S::Type> values(RowsView* view, bool drawn) {
    view->row = case_.heads_last ? case_.heads * case_.head_dim : case_.head_dim;
    view->head = case_.heads_last ? case_.head_dim : case_.rows * case_.head_dim;
    view->batch = case_.rows * case_.heads * case_.head_dim;
    std::vector<typename S::Type> data(case_.batch * view->batch);
    for (auto& x : data) x = S::store(drawn ? (static_cast<int>(random_() % 65) - 32) / 16.0 : NAN);
    view->data = data.data();
    return data;
  }
  void zero(int64_t b, int64_t h, int64_t r) {
    if (b < case_.batch) std::fill_n(x_.begin() + params_.x.offset(b, h, r), case_.head_dim, S::store(0));
  }
  double at(const std::vector<typename S::Type>& data, const RowsView& view, int64_t b, int64_t h, int64_t r, int64_t c) const {
    return S::load(data[view.offset(b, h, r) + c]);
  }
  void finish_launch(const Status& status) {
    check(status.ok(), [&] { return std::string(case_.name) + ": " + status.message(); });
  }
  void expect(const char* what, double got, double want, double allowed) {
    check(std::abs(got - want) <= allowed, [&] {
      return std::string(case_.name) + ", " + what + ": expected " + std::to_string(want) + ", got " + std::to_string(got);
    });
  }

  // <u, dout>
  double check_row(int64_t b, int64_t h, int64_t r, double factor) {
    double square = 0, product = 0, dout = 0;
    for (int64_t c = 0; c < case_.head_dim; ++c) {
      const double x = at(x_, params_.x, b, h, r, c), d = at(dout_, params_.dout, b, h, r, c);
      square += x * x;
      product += x * d;
      dout += d * d;
    }
    const double inverse = square == 0 ? 0 : 1 / std::sqrt(square), along = inverse * product;
    for (int64_t c = 0; c < case_.head_dim; ++c) {
      const double u = inverse * at(x_, params_.x, b, h, r, c), d = at(dout_, params_.dout, b, h, r, c);
      expect("out", at(out_, params_.out, b, h, r, c), factor * u, 4 * S::kEpsilon * factor);
      expect("dx", at(dx_, params_.dx, b, h, r, c), factor * inverse * (d - u * along),
             8 * S::kEpsilon * factor * inverse * std::sqrt(dout));
    }
    return along;
  }

  L2Case case_;
  std::mt19937 random_;
  L2NormalizeParams params_;
  std::vector<typename S::Type> x_, dout_, out_, dx_;
};

template <class Backend>
void test_l2_normalize() {
  const L2Case cases[] = {
      {"one number", 1, 1, 1, 1, true, true},          {"more rows than an item", 2, 133, 3, 32, true, true},
      {"heads first", 2, 17, 3, 32, false, true},      {"no factor", 1, 70, 2, 24, true, false},
      {"ragged channels", 2, 9, 5, 17, true, true},    {"wider than a warp's load", 1, 5, 2, 300, true, true},
      {"aligned and wide", 1, 5, 2, 520, false, true}, {"many rows", 1, 3000, 1, 8, true, true},
      {"empty batch", 0, 4, 2, 8, true, true},         {"no rows", 2, 0, 2, 8, true, true},
  };
  for (const L2Case& c : cases) {
    L2Test<Backend, DType::kFloat64>(c).run();
    L2Test<Backend, DType::kFloat32>(c).run();
    L2Test<Backend, DType::kBFloat16>(c).run();
    L2Test<Backend, DType::kFloat16>(c).run();
  }
}

}  // namespace natrpb::test
