// What every binding needs: checks of torch tensors that end in a sentence, and how a backend is asked for.
//
// A backend is an object made from the tensor that an op takes its sizes from, and kept while the op runs: it checks that all
// tensors are where its launchers run, and hands them what they need. The op bodies are templates over it, so each exists once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "natrpb/local_attention.h"
#include "natrpb/status.h"

namespace natrpb::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline std::string listed(const Ints& numbers) {
  std::string text = "[";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}
inline std::string shape_of(const Tensor& t) {
  Ints sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return listed(sizes);
}

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

// Scores, lse, bias tables and sums: fp32, fp64 for fp64.
inline DType wide(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
inline ScalarType wide_type(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

// An uninitialised contiguous tensor on the model's device. NB: torch::stable::new_empty looks the op up by name every time.
inline Tensor new_tensor(const Tensor& model, const Ints& sizes, ScalarType dtype) {
  auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = aoti_torch_aten_new_empty(model.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &type,
                                                         nullptr, nullptr, 0, nullptr, &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "could not allocate a tensor of shape ", listed(sizes));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Kernels read contiguous channels; any other stride is theirs to follow.
inline Tensor with_contiguous_channels(const Tensor& t) {
  return t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1 ? torch::stable::contiguous(t) : t;
}

inline Tensor rounded(const Tensor& sums, const Tensor& model) {
  return sums.scalar_type() == model.scalar_type() ? sums : torch::stable::to(sums, model.scalar_type());
}

inline void finish(const Status& status) { STD_TORCH_CHECK(status.ok(), status.message()); }

}  // namespace natrpb::binding
