// Storage types of tensors: conversion to and from double, and the error that one rounding makes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "natrpb/local_attention.h"

namespace natrpb::test {

template <DType kDType>
struct Storage;

template <>
struct Storage<DType::kFloat64> {
  using Type = double;
  using Wide = double;  // of rpb, lse and their gradients
  static constexpr double kEpsilon = 1e-15;
  static double load(Type x) { return x; }
  static Type store(double x) { return x; }
};

template <>
struct Storage<DType::kFloat32> {
  using Type = float;
  using Wide = float;
  static constexpr double kEpsilon = 6e-8;
  static double load(Type x) { return x; }
  static Type store(double x) { return static_cast<float>(x); }
};

template <>
struct Storage<DType::kBFloat16> {  // the upper half of a float
  using Type = uint16_t;
  using Wide = float;
  static constexpr double kEpsilon = 4e-3;
  static double load(Type x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static Type store(double x) {
    const float value = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<Type>(bits >> 16);
  }
};

template <>
struct Storage<DType::kFloat16> {  // 1 sign, 5 exponent, 10 mantissa bits
  using Type = uint16_t;
  using Wide = float;
  static constexpr double kEpsilon = 5e-4;
  static double load(Type x) {
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                        : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                       : std::ldexp(mantissa, -24);
    return x & 0x8000 ? -size : size;
  }
  static Type store(double x) {  // NaN, zero and normal numbers
    if (std::isnan(x)) return 0x7e00;
    if (x == 0) return 0;
    int exponent;
    const double fraction = std::frexp(std::fabs(x), &exponent);  // in [1/2, 1)
    const int mantissa = static_cast<int>(std::ldexp(fraction, 11));
    return static_cast<Type>((x < 0 ? 0x8000 : 0) + ((exponent + 14) << 10) + mantissa - 1024);
  }
};

}  // namespace natrpb::test
