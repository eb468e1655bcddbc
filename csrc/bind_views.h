// How tensors arrive from Python, for both bindings: (address, bytes per element, row stride, column stride).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <string>

#include "common/int_view.h"
#include "common/mrope.h"

namespace qwen2vl {

using RawView = std::array<int64_t, 4>;

// The index of one of so many kernels.
inline size_t kernel_of(int64_t index, size_t kernels) {
  if (index < 0 || index >= static_cast<int64_t>(kernels)) throw pybind11::value_error("there is no such kernel");
  return static_cast<size_t>(index);
}

inline IntView int_view(const char* name, const RawView& raw) {
  if (raw[1] != 1 && raw[1] != 4 && raw[1] != 8) {
    throw pybind11::value_error(std::string(name) + ": elements of " + std::to_string(raw[1]) + " bytes are not read");
  }
  return {reinterpret_cast<const void*>(raw[0]), raw[1], raw[2], raw[3]};
}

// sizes: rows, columns, images, videos, sequences; tokens: image id, video id, merge size.
inline MropeInput mrope_input(const RawView& ids, const RawView& mask, const RawView& image_grids,
                              const RawView& video_grids, const RawView& cu_seqlens, const RawView& state,
                              const std::array<int64_t, 5>& sizes, const std::array<int64_t, 3>& tokens) {
  const MropeInput in{int_view("ids", ids),
                      int_view("mask", mask),
                      int_view("image_grids", image_grids),
                      int_view("video_grids", video_grids),
                      int_view("cu_seqlens", cu_seqlens),
                      sizes[0],
                      sizes[1],
                      sizes[2],
                      sizes[3],
                      sizes[4],
                      tokens[0],
                      tokens[1],
                      tokens[2],
                      int_view("state", state)};
  for (const int64_t size : sizes) {
    if (size < 0) throw pybind11::value_error("sizes must not be negative");
  }
  if (in.merge_size < 1) throw pybind11::value_error("merge_size must be at least 1");
  if (in.rows > 0 && in.columns > (std::numeric_limits<int32_t>::max() - 1) / in.rows) {
    throw pybind11::value_error("rows * columns must stay below 2^31 - 1");
  }
  if (in.cu_seqlens.given() ? in.rows != 1 : in.sequences != in.rows) {
    throw pybind11::value_error("sequences must be the rows, or the segments of a single row");
  }
  return in;
}

}  // namespace qwen2vl
