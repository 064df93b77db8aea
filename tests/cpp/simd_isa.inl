// The vector functions of cpu/simd.inl for one instruction set, as loops over arrays; included once per set by test_simd.cpp.
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

}  // namespace natrpb::test::NATRPB_ISA

#include "cpu/isa_end.inl"

#undef NATRPB_ISA
#undef NATRPB_VECTOR_BYTES
#undef NATRPB_TARGET
