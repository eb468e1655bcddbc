// Products of few rows and what surrounds them in a step of decoding. All elements are bf16 where nothing else is said.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "bind_views.h"
#include "cpu/decoder_step.h"
#include "cpu/few_rows.h"

namespace qwen2vl {

inline const uint16_t* halves(const char* name, const RawView& view) {
  if (view[0] != 0 && (view[1] != 2 || view[3] != 1)) {
    throw pybind11::value_error(std::string(name) + ": wants rows of elements of two bytes");
  }
  return reinterpret_cast<const uint16_t*>(view[0]);
}

// sizes: rows, outputs, width.
inline FewRows product_of(const RawView& x, const RawView& weight, const RawView& bias, const RawView& y,
                          const std::array<int64_t, 3>& sizes) {
  if (sizes[0] < 0 || sizes[1] < 0 || sizes[2] < 0) throw pybind11::value_error("sizes must not be negative");
  return {halves("x", x),
          x[2],
          halves("weight", weight),
          weight[2],
          halves("bias", bias),
          const_cast<uint16_t*>(halves("y", y)),
          y[2],
          sizes[0],
          sizes[1],
          sizes[2]};
}

inline RmsNorm norm_of(const RawView& x, const RawView& weight, double eps) {
  return {halves("x", x), x[2], halves("norm_weight", weight), static_cast<float>(eps)};
}

inline void bind_step(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("few_rows_kernels", [] {
    std::vector<std::string> names;
    for (const FewRowsKernel& kernel : few_rows_kernels()) names.emplace_back(kernel.name);
    return names;
  });
  m.def("step_kernels", [] {
    std::vector<std::string> names;
    for (const StepKernel& kernel : step_kernels()) names.emplace_back(kernel.name);
    return names;
  });

  // options, here and below: threads, index of the kernel.
  m.def(
      "few_rows",
      [](const RawView& x, const RawView& weight, const RawView& bias, const RawView& y,
         const std::array<int64_t, 3>& sizes, const std::array<int64_t, 2>& options) {
        const FewRows p = product_of(x, weight, bias, y, sizes);
        const size_t kernel = kernel_of(options[1], few_rows_kernels().size());
        const py::gil_scoped_release release;
        few_rows(&p, 1, options[0], kernel);
      },
      py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("sizes"), py::arg("options"));

  // counts: outputs of each weight, whose results stand side by side in y; sizes: rows, width.
  m.def(
      "rms_norm_linear",
      [](const RawView& x, const RawView& norm_weight, double eps, const std::vector<RawView>& weights,
         const std::vector<RawView>& biases, const std::vector<int64_t>& counts, const RawView& y,
         const std::array<int64_t, 2>& sizes, const std::array<int64_t, 2>& options) {
        std::array<FewRows, 3> products{};
        if (weights.empty() || weights.size() > products.size() || biases.size() != weights.size() ||
            counts.size() != weights.size()) {
          throw py::value_error("wants one to three weights, and a bias and a count for each");
        }
        RawView at = y;
        for (size_t n = 0; n < weights.size(); ++n) {
          products[n] = product_of(x, weights[n], biases[n], at, {sizes[0], counts[n], sizes[1]});
          at[0] += 2 * counts[n];
        }
        const RmsNorm norm = norm_of(x, norm_weight, eps);
        const size_t kernel = kernel_of(options[1], few_rows_kernels().size());
        const py::gil_scoped_release release;
        rms_norm_linear(norm, products, options[0], kernel);
      },
      py::arg("x"), py::arg("norm_weight"), py::arg("eps"), py::arg("weights"), py::arg("biases"), py::arg("counts"),
      py::arg("y"), py::arg("sizes"), py::arg("options"));

  // options: threads, index of the products' kernel and of the step's.
  m.def(
      "rms_norm_swiglu",
      [](const RawView& x, const RawView& norm_weight, double eps, const RawView& gate_weight, const RawView& up_weight,
         const RawView& y, const std::array<int64_t, 3>& sizes, const std::array<int64_t, 3>& options) {
        const FewRows gate = product_of(x, gate_weight, RawView{}, y, sizes);
        const FewRows up = product_of(x, up_weight, RawView{}, y, sizes);
        const RmsNorm norm = norm_of(x, norm_weight, eps);
        const size_t kernel = kernel_of(options[1], few_rows_kernels().size());
        const size_t step_kernel = kernel_of(options[2], step_kernels().size());
        const py::gil_scoped_release release;
        rms_norm_swiglu(norm, gate, up, options[0], kernel, step_kernel);
      },
      py::arg("x"), py::arg("norm_weight"), py::arg("eps"), py::arg("gate_weight"), py::arg("up_weight"), py::arg("y"),
      py::arg("sizes"), py::arg("options"));

  m.def(
      "linear_add",
      [](const RawView& residual, const RawView& x, const RawView& weight, const std::array<int64_t, 3>& sizes,
         const std::array<int64_t, 2>& options) {
        const FewRows p = product_of(x, weight, RawView{}, residual, sizes);
        const size_t kernel = kernel_of(options[1], few_rows_kernels().size());
        const py::gil_scoped_release release;
        linear_add(p, options[0], kernel);
      },
      py::arg("residual"), py::arg("x"), py::arg("weight"), py::arg("sizes"), py::arg("options"));

  // strides: of q, k, v (row, head), k_cache, v_cache (row, slot, head); lengths int32, positions int32 or int64,
  // inv_freq float32, all of one dimension; out is dense. sizes: rows, heads, key heads, columns, capacity.
  m.def(
      "decode_attention",
      [](const std::array<int64_t, 5>& tensors, const std::array<int64_t, 12>& strides, const RawView& lengths,
         const RawView& positions, const RawView& inv_freq, int64_t out, const std::array<int64_t, 5>& sizes,
         double scale, const std::array<int64_t, 2>& options) {
        const auto [rows, heads, kv_heads, columns, capacity] = sizes;
        if (rows < 0 || heads < 0 || capacity < 0 || kv_heads < 1 || heads % kv_heads != 0) {
          throw py::value_error("sizes must not be negative, and heads a multiple of the key heads");
        }
        if (columns < 1 || columns % 16 != 0) throw py::value_error("columns must be a multiple of 16");
        if (lengths[1] != 4 || (positions[1] != 4 && positions[1] != 8) || inv_freq[1] != 4 || inv_freq[3] != 1) {
          throw py::value_error("wants int32 lengths, int32 or int64 positions and float32 frequencies");
        }
        const auto at = [&](int n) { return reinterpret_cast<uint16_t*>(tensors[static_cast<size_t>(n)]); };
        const DecodeAttention p{at(0),
                                at(1),
                                at(2),
                                {strides[0], strides[1]},
                                {strides[2], strides[3]},
                                {strides[4], strides[5]},
                                at(3),
                                at(4),
                                {strides[6], strides[7], strides[8]},
                                {strides[9], strides[10], strides[11]},
                                reinterpret_cast<const int32_t*>(lengths[0]),
                                lengths[3],
                                reinterpret_cast<const void*>(positions[0]),
                                positions[1],
                                positions[3],
                                reinterpret_cast<const float*>(inv_freq[0]),
                                reinterpret_cast<uint16_t*>(out),
                                static_cast<float>(scale),
                                rows,
                                heads,
                                kv_heads,
                                columns,
                                capacity};
        const size_t kernel = kernel_of(options[1], step_kernels().size());
        const py::gil_scoped_release release;
        decode_attention(p, options[0], kernel);
      },
      py::arg("tensors"), py::arg("strides"), py::arg("lengths"), py::arg("positions"), py::arg("inv_freq"),
      py::arg("out"), py::arg("sizes"), py::arg("scale"), py::arg("options"));
}

}  // namespace qwen2vl
