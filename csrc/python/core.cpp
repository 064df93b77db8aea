// natrpb._core: the compiled geometry and build information, for tools and tests. No torch, no kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/yardstick.h"
#include "natrpb/geometry.h"

namespace py = pybind11;

namespace {

using natrpb::Axis;
using natrpb::AxisKind;
using natrpb::Interval;
using Span = std::tuple<int64_t, int64_t, int64_t>;  // first, last, step; global positions, empty where first > last

Axis make_axis(int64_t length, int64_t kernel_size, int64_t stride, int64_t dilation, int64_t kind, int64_t shift) {
  const auto require = [](bool holds, const std::string& sentence) {
    if (!holds) throw std::invalid_argument(sentence);
  };
  require(length >= 1, "length must be at least 1, got " + std::to_string(length));
  require(kernel_size >= 1, "kernel_size must be at least 1, got " + std::to_string(kernel_size));
  constexpr int64_t kMost = int64_t{1} << 31;
  require(1 <= dilation && dilation <= kMost, "dilation must be between 1 and 2^31, got " + std::to_string(dilation));
  require(1 <= stride && stride <= kernel_size, "stride must be between 1 and kernel_size, got " + std::to_string(stride));
  require(0 <= kind && kind <= 2, "kind must be 0 (neighborhood), 1 (causal) or 2 (window), got " + std::to_string(kind));
  require(0 <= shift && shift < kernel_size, "shift must be between 0 and kernel_size - 1, got " + std::to_string(shift));
  require(kind == 2 || dilation <= length / kernel_size, "kernel_size * dilation must not exceed length, got " +
                                                             std::to_string(kernel_size) + " * " + std::to_string(dilation) +
                                                             " > " + std::to_string(length));
  Axis axis;
  axis.length = length;
  axis.kernel_size = kernel_size;
  axis.stride = stride;
  axis.dilation = dilation;
  axis.shift = shift;
  axis.kind = static_cast<AxisKind>(kind);
  return axis;
}

void check_position(const Axis& axis, const char* name, int64_t i) {
  if (i < 0 || i >= axis.length) {
    throw std::out_of_range(std::string(name) + " must be between 0 and " + std::to_string(axis.length - 1) + ", got " +
                            std::to_string(i));
  }
}

Span globally(const Axis& axis, int64_t group, Interval interval) {
  return {axis.position(group, interval.first), axis.position(group, interval.last), axis.dilation};
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled geometry of local attention, and what this build holds.";

  py::class_<Axis>(m, "Axis", "One axis of an attention pattern; positions are global, 0 .. length - 1.")
      .def(py::init(&make_axis), py::arg("length"), py::arg("kernel_size"), py::arg("stride") = 1, py::arg("dilation") = 1,
           py::arg("kind") = 0, py::arg("shift") = 0)
      .def(
          "keys",
          [](const Axis& axis, int64_t query) {
            check_position(axis, "query", query);
            const int64_t group = query % axis.dilation;
            return globally(axis, group, axis.keys(query / axis.dilation, axis.group_length(group)));
          },
          py::arg("query"), "(first, last, step) of the keys that a query sees.")
      .def(
          "queries",
          [](const Axis& axis, int64_t key) {
            check_position(axis, "key", key);
            const int64_t group = key % axis.dilation;
            return globally(axis, group, axis.queries(key / axis.dilation, axis.group_length(group)));
          },
          py::arg("key"), "(first, last, step) of the queries that see a key; first > last where none does.")
      .def(
          "bias_index",
          [](const Axis& axis, int64_t query, int64_t key) {
            check_position(axis, "query", query);
            check_position(axis, "key", key);
            const int64_t group = query % axis.dilation, p = query / axis.dilation;
            if (key % axis.dilation != group || !axis.keys(p, axis.group_length(group)).contains(key / axis.dilation)) {
              throw std::invalid_argument("query " + std::to_string(query) + " does not see key " + std::to_string(key));
            }
            return axis.bias_index(p, key / axis.dilation);
          },
          py::arg("query"), py::arg("key"), "Index into a bias table's axis of 2 * kernel_size - 1 entries.")
      .def_readonly("length", &Axis::length)
      .def_readonly("kernel_size", &Axis::kernel_size)
      .def_readonly("stride", &Axis::stride)
      .def_readonly("dilation", &Axis::dilation)
      .def_readonly("shift", &Axis::shift);

  m.def(
      "isa_names",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i <= static_cast<int>(natrpb::cpu::detected_isa()); ++i) {
          names.emplace_back(natrpb::cpu::isa_name(static_cast<natrpb::cpu::Isa>(i)));
        }
        return names;
      },
      "Instruction sets that this machine can run, narrowest first.");
  m.def("isa", [] { return natrpb::cpu::isa_name(natrpb::cpu::active_isa()); }, "The instruction set that the kernels use.");
  m.def(
      "fma_gflops", [](double seconds) { return natrpb::cpu::fma_gflops(natrpb::cpu::active_isa(), seconds); },
      py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
      "fp32 GFLOP/s of multiply-adds in registers, by the calling thread and the instruction set in use.");
  m.def(
      "stream_gbytes",
      [](bool triad, int64_t elements, double seconds) {
        using natrpb::cpu::Stream;
        return natrpb::cpu::stream_gbytes(triad ? Stream::kTriad : Stream::kCopy, elements, seconds);
      },
      py::arg("triad"), py::arg("elements"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
      "GB/s of copying (or a[i] = b[i] + 3 c[i]) arrays of fp32 elements, by the calling thread.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = NATRPB_VERSION;
        info["compiler"] =
#if defined(__clang__)
            "clang " __clang_version__;
#else
            "gcc " __VERSION__;
#endif
        info["torch"] = NATRPB_BUILD_TORCH;
        info["nvcc"] = NATRPB_BUILD_NVCC;
        info["cuda_architectures"] = NATRPB_BUILD_CUDA;
        info["cuda_reason"] = NATRPB_BUILD_CUDA_REASON;
        return info;
      },
      "Version, compiler, the torch that the build used, and its CUDA part (nvcc, architectures, or why there is none).");
}
