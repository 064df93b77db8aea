// The vector functions of cpu/simd.inl for one instruction set, as loops over arrays; included once per set by test_simd.cpp.
#ifndef __clang__
#pragma GCC push_options
#endif
#include "cpu/isa_begin.inl"

namespace natrpb::test::NATRPB_ISA {

inline constexpr int kVectorBytes = NATRPB_VECTOR_BYTES;

#include "cpu/simd.inl"

// `count` is a multiple of the lanes.
template <class T>
void exp_and_log(const T* x, int64_t count, T* exps, T* logs) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    store(exps + i, exp<T>(load(x + i)));
    store(logs + i, log<T>(load(x + i)));
  }
}

// x rounded to bf16.
void round_to_bf16(const float* x, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += kLanes<float>) store_as(reinterpret_cast<BFloat16*>(to + i), load(x + i));
}

#ifdef NATRPB_BF16_PRODUCTS
// x[i] and y[i] rounded to bf16, one behind the other; the sum of their squares, added to sum[i].
void add_squares(const float* x, const float* y, int64_t count, uint16_t* pairs, float* sum) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const Vec<float> pair = pair_up(load(x + i), load(y + i));
    store(reinterpret_cast<float*>(pairs + 2 * i), pair);
    store(sum + i, multiply_add<Pair>(load(sum + i), pair, pair));
  }
}
#undef NATRPB_BF16_PRODUCTS
#endif

}  // namespace natrpb::test::NATRPB_ISA

#include "cpu/isa_end.inl"
#ifndef __clang__
#pragma GCC pop_options
#endif

#undef NATRPB_ISA
#undef NATRPB_VECTOR_BYTES
#undef NATRPB_TARGET
