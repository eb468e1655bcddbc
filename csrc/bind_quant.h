// Reads what describes a quantised weight, and checks all that an address does not hide.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "bind_views.h"
#include "cpu/quant_linear.h"

namespace qwen2vl {

// sizes: outputs, width, outputs and columns of a block. fp8: whether bytes are e4m3 numbers.
inline QuantWeight quant_weight(const RawView& w, const RawView& scales, int64_t scale_type, const RawView& zeros,
                                bool fp8, int64_t w_width, const std::array<int64_t, 4>& sizes) {
  const auto [outputs, width, block_outputs, block_width] = sizes;
  if (outputs < 0 || width < 0 || block_outputs < 1 || block_width < 1) {
    throw pybind11::value_error("sizes must not be negative, and blocks at least 1");
  }
  if (width % 32 != 0 || (block_width % 32 != 0 && block_width < width)) {
    throw pybind11::value_error("width and blocks must be multiples of 32");
  }
  if (w[1] != 1 || w[3] != 1 || (w_width != width && (fp8 || 2 * w_width != width))) {
    throw pybind11::value_error("the weight wants rows of width bytes, or half as many");
  }
  if (scale_type < 0 || scale_type > 2 || scales[1] != (scale_type == 0 ? 4 : 2) || scales[3] != 1) {
    throw pybind11::value_error("scales want rows of float32, bf16 or float16");
  }
  if (zeros[0] != 0 && (fp8 || zeros[1] != 1 || zeros[3] != 1)) {
    throw pybind11::value_error("zeros want rows of bytes, and integers");
  }
  return {reinterpret_cast<const uint8_t*>(w[0]),
          w[2],
          reinterpret_cast<const void*>(scales[0]),
          scales[2],
          static_cast<ScaleType>(scale_type),
          reinterpret_cast<const uint8_t*>(zeros[0]),
          zeros[2],
          fp8                ? Quantised::kFp8
          : w_width == width ? Quantised::kInt8
                             : Quantised::kInt4,
          outputs,
          width,
          block_outputs,
          block_width};
}

inline void bind_quant(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("quant_kernels", [] {
    std::vector<std::string> names;
    for (const QuantKernel& kernel : quant_kernels()) names.emplace_back(kernel.name);
    return names;
  });

  // weight, scales, their type, zeros, fp8, bytes of a row of the weight; x, bias and y are float32, or bf16. options:
  // threads, index of the kernel.
  m.def(
      "quant_linear",
      [](const RawView& w, const RawView& scales, int64_t scale_type, const RawView& zeros, bool fp8, int64_t w_width,
         const RawView& x, const RawView& bias, const RawView& y, int64_t rows, const std::array<int64_t, 4>& sizes,
         const std::array<int64_t, 2>& options) {
        for (const RawView* view : {&x, &bias, &y}) {
          if ((*view)[0] == 0 && view == &bias) continue;
          if (((*view)[1] != 4 && (*view)[1] != 2) || (*view)[1] != x[1] || (*view)[3] != 1) {
            throw py::value_error("x, bias and y want rows of float32, or of bf16");
          }
        }
        if (rows < 0) throw py::value_error("rows must not be negative");
        const QuantLinear p{quant_weight(w, scales, scale_type, zeros, fp8, w_width, sizes),
                            reinterpret_cast<const void*>(x[0]),
                            x[2],
                            reinterpret_cast<const void*>(bias[0]),
                            reinterpret_cast<void*>(y[0]),
                            y[2],
                            x[1] == 2,
                            rows,
                            nullptr,
                            nullptr};
        const size_t kernel = kernel_of(options[1], quant_kernels().size());
        const py::gil_scoped_release release;
        quant_linear(p, options[0], kernel);
      },
      py::arg("weight"), py::arg("scales"), py::arg("scale_type"), py::arg("zeros"), py::arg("fp8"),
      py::arg("row_bytes"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("rows"), py::arg("sizes"),
      py::arg("options"));

  // The weight's values, float32 or bf16.
  m.def(
      "quant_values",
      [](const RawView& w, const RawView& scales, int64_t scale_type, const RawView& zeros, bool fp8, int64_t w_width,
         const RawView& y, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 2>& options) {
        if ((y[1] != 4 && y[1] != 2) || y[3] != 1) throw py::value_error("y wants rows of float32 or bf16");
        const QuantValues p{quant_weight(w, scales, scale_type, zeros, fp8, w_width, sizes),
                            reinterpret_cast<void*>(y[0]), y[2], y[1] == 2};
        const size_t kernel = kernel_of(options[1], quant_kernels().size());
        const py::gil_scoped_release release;
        quant_values(p, options[0], kernel);
      },
      py::arg("weight"), py::arg("scales"), py::arg("scale_type"), py::arg("zeros"), py::arg("fp8"),
      py::arg("row_bytes"), py::arg("y"), py::arg("sizes"), py::arg("options"));
}

}  // namespace qwen2vl
