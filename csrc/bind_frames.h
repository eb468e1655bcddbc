// How frames arrive from Python, for both bindings, and the checks without which a call could leave its buffers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cpu/image_to_patches.h"

namespace qwen2vl {

// address, height, width, channels, row stride in bytes; height and width wanted; output address, patch stride, channel
// stride, copies.
using RawFrame = std::array<int64_t, 11>;

inline PatchOptions patch_options(const std::array<int64_t, 6>& raw, size_t kernels) {
  const auto refuse = [](const char* what) { throw pybind11::value_error(what); };
  if (raw[0] < 1 || raw[0] > 1024 || raw[1] < 1 || raw[1] > 1024) refuse("patch and merge must be in 1..1024");
  if (raw[2] < 0 || raw[2] > 2) refuse("unknown type of values");
  if (raw[2] != 0 && raw[3] == 0) refuse("values other than bytes need a table");
  if (raw[4] < 1) refuse("threads must be at least 1");
  if (raw[5] < 0 || static_cast<size_t>(raw[5]) >= kernels) refuse("unknown row kernels");
  return {raw[0], raw[1], static_cast<PatchType>(raw[2]), reinterpret_cast<const void*>(raw[3]), raw[4], raw[5]};
}

inline FrameJob frame_job(const RawFrame& raw, const PatchOptions& options) {
  const auto refuse = [](const char* what) { throw pybind11::value_error(what); };
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;  // sides; taps and offsets stay within 32 bits
  for (const int n : {1, 2, 5, 6}) {
    if (raw[static_cast<size_t>(n)] < 1 || raw[static_cast<size_t>(n)] > kMost) refuse("sides must be in 1..2^29");
  }
  if (raw[3] != 1 && raw[3] != 3 && raw[3] != 4) refuse("channels must be 1, 3 or 4");
  const int64_t block = options.patch * options.merge;
  if (raw[5] % block != 0 || raw[6] % block != 0) refuse("wanted sides must be multiples of patch * merge");
  if (raw[0] == 0 || raw[7] == 0) refuse("address 0");
  if (raw[10] < 1) refuse("copies must be at least 1");
  return {reinterpret_cast<const uint8_t*>(raw[0]), raw[1], raw[2], raw[3], raw[4], raw[5], raw[6],
          reinterpret_cast<void*>(raw[7]),          raw[8], raw[9], raw[10]};
}

inline std::vector<FrameJob> frame_jobs(const std::vector<RawFrame>& frames, const PatchOptions& options) {
  std::vector<FrameJob> jobs;
  for (const RawFrame& frame : frames) jobs.push_back(frame_job(frame, options));
  return jobs;
}

}  // namespace qwen2vl
