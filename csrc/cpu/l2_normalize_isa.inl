// The l2_normalize kernels of one instruction set; see local_attention_isa.inl for how these files are made.
//
// An item is up to kL2ItemRows rows of one batch entry, in all heads, in the order of memory. A row is read twice, the second
// time from the first-level cache. Bytes: x, in the backward pass dout too, read once, one tensor written.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/l2_normalize_kernels.h"

#include "cpu/isa_begin.inl"

namespace natrpb::cpu::NATRPB_ISA {

inline constexpr int kVectorBytes = NATRPB_VECTOR_BYTES;

#include "cpu/simd.inl"

#include "cpu/local_attention_copies.inl"

namespace l2 {

// v + (v with lanes S apart exchanged), then the same with S / 2: every lane ends with the sum of all.
template <int S, class V, int... J>
NATRPB_INLINE V sum_rounds(V v, std::integer_sequence<int, J...> lanes) {
  v += __builtin_shufflevector(v, v, (J ^ S)...);
  if constexpr (S > 1) return sum_rounds<S / 2>(v, lanes);
  return v;
}
template <class T>
NATRPB_INLINE T sum_of_lanes(Vec<T> v) {
  return sum_rounds<kLanes<T> / 2>(v, std::make_integer_sequence<int, kLanes<T>>{})[0];
}

NATRPB_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
NATRPB_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// 1 / |x| from |x|^2, and 0 from 0. NB: written so that NaN stays NaN.
template <class T>
NATRPB_INLINE T inverse_length(T square) {
  return square == T(0) ? T(0) : T(1) / square_root(square);
}

template <class S>
struct L2Normalize {
  using T = Compute<S>;
  static constexpr int L = kLanes<T>;

  const L2NormalizeParams& params;

  S* at(const RowsView& view, int64_t b, int64_t h, int64_t r) const {
    return static_cast<S*>(view.data) + view.offset(b, h, r);
  }
  T factor(int64_t h) const { return params.factor ? static_cast<const T*>(params.factor)[h] : T(1); }

  // f(batch, head, row)
  template <class F>
  NATRPB_INLINE void for_each_row(int64_t item, F&& f) const {
    const int64_t batch = item / l2_items_per_batch(params), begin = item % l2_items_per_batch(params) * kL2ItemRows;
    for (int64_t row = begin; row < min_of(begin + kL2ItemRows, params.rows); ++row) {
      for (int64_t head = 0; head < params.heads; ++head) f(batch, head, row);
    }
  }

  void forward(int64_t item) const {
    const int64_t channels = params.head_dim;
    for_each_row(item, [&](int64_t b, int64_t h, int64_t r) NATRPB_LAMBDA {
      const S* x = at(params.x, b, h, r);
      S* out = at(params.out, b, h, r);
      Vec<T> square{};
      for (int64_t c = 0; c < channels; c += L) {
        const Vec<T> v = load_channels<T>(x + c, channels - c);
        square += v * v;
      }
      const Vec<T> scale = splat(factor(h) * inverse_length(sum_of_lanes<T>(square)));
      for (int64_t c = 0; c < channels; c += L) {
        store_channels<T>(out + c, load_channels<T>(x + c, channels - c) * scale, channels - c);
      }
    });
  }

  void backward(int64_t item) const {
    const int64_t channels = params.head_dim;
    T* dfactor = params.dfactor ? static_cast<T*>(params.workspace) + item * params.heads : nullptr;
    if (dfactor) clear(dfactor, params.heads);
    for_each_row(item, [&](int64_t b, int64_t h, int64_t r) NATRPB_LAMBDA {
      const S *x = at(params.x, b, h, r), *dout = at(params.dout, b, h, r);
      S* dx = at(params.dx, b, h, r);
      Vec<T> square{}, product{};
      for (int64_t c = 0; c < channels; c += L) {
        const Vec<T> v = load_channels<T>(x + c, channels - c), dv = load_channels<T>(dout + c, channels - c);
        square += v * v;
        product += v * dv;
      }
      const T inverse = inverse_length(sum_of_lanes<T>(square));
      const T along = inverse * sum_of_lanes<T>(product);  // <u, dout>
      if (dfactor) dfactor[h] += along;
      const Vec<T> to_unit = splat(inverse), part = splat(along), scale = splat(factor(h) * inverse);
      for (int64_t c = 0; c < channels; c += L) {
        const Vec<T> v = load_channels<T>(x + c, channels - c), dv = load_channels<T>(dout + c, channels - c);
        store_channels<T>(dx + c, scale * (dv - part * (v * to_unit)), channels - c);
      }
    });
  }
};

// ---- entry points, see l2_normalize_kernels.h ----

template <class F>
void with_worker(const L2NormalizeParams& params, F&& f) {
  switch (params.dtype) {
    case DType::kFloat64:
      return f(L2Normalize<double>{params});
    case DType::kBFloat16:
      return f(L2Normalize<BFloat16>{params});
    case DType::kFloat16:
      return f(L2Normalize<Float16>{params});
    default:
      return f(L2Normalize<float>{params});
  }
}

void forward_item(const L2NormalizeParams& params, int64_t item) {
  with_worker(params, [=](const auto& worker) { worker.forward(item); });
}
void backward_item(const L2NormalizeParams& params, int64_t item) {
  with_worker(params, [=](const auto& worker) { worker.backward(item); });
}

}  // namespace l2

extern const L2NormalizeKernels kL2NormalizeKernels = {l2::forward_item, l2::backward_item};

}  // namespace natrpb::cpu::NATRPB_ISA

#include "cpu/isa_end.inl"
