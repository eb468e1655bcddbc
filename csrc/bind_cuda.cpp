// Python module qwen2vl_kernels._cuda: checks and exports only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_attention.h"
#include "bind_frames.h"
#include "bind_views.h"
#include "cuda/attention.h"
#include "cuda/device.h"
#include "cuda/image_to_patches.h"
#include "cuda/mrope_positions.h"
#include "cuda/vision_positions.h"

namespace py = pybind11;
using qwen2vl::RawView;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of qwen2vl_kernels. Tensors come as (address, bytes per element, row stride, column stride).";

  m.def("device_problem", &qwen2vl::device_problem, py::arg("device"), py::call_guard<py::gil_scoped_release>());

  m.def("mrope_workspace_bytes", &qwen2vl::mrope_workspace_bytes, py::arg("tokens"), py::arg("images"),
        py::arg("videos"), py::arg("sequences"));

  m.def(
      "mrope_positions",
      [](const RawView& ids, const RawView& mask, const RawView& image_grids, const RawView& video_grids,
         const RawView& cu_seqlens, const RawView& state, const std::array<int64_t, 5>& sizes,
         const std::array<int64_t, 3>& tokens, int64_t positions, int64_t delta, int64_t state_out, int64_t workspace,
         int device, int64_t stream) {
        const auto in = qwen2vl::mrope_input(ids, mask, image_grids, video_grids, cu_seqlens, state, sizes, tokens);
        const char* failure = nullptr;
        {
          const py::gil_scoped_release release;
          failure = qwen2vl::mrope_positions_cuda(
              in, reinterpret_cast<int64_t*>(positions), reinterpret_cast<int64_t*>(delta),
              reinterpret_cast<int64_t*>(state_out), reinterpret_cast<int64_t*>(workspace), device,
              reinterpret_cast<void*>(stream));
        }
        if (failure != nullptr) throw std::runtime_error(std::string("mrope_positions: launch failed: ") + failure);
      },
      py::arg("ids"), py::arg("mask"), py::arg("image_grids"), py::arg("video_grids"), py::arg("cu_seqlens"),
      py::arg("state"), py::arg("sizes"), py::arg("tokens"), py::arg("positions"), py::arg("delta"),
      py::arg("state_out"), py::arg("workspace"), py::arg("device"), py::arg("stream"));

  m.def(
      "vision_positions",
      [](const RawView& grids, int64_t items, int64_t merge, int64_t patches, int64_t positions, int64_t workspace,
         int device, int64_t stream) {
        const auto view = qwen2vl::int_view("grids", grids);
        if (items < 0 || patches < 0 || patches > std::numeric_limits<int32_t>::max()) {
          throw py::value_error("items must not be negative, patches must be in [0, 2^31)");
        }
        if (merge < 1 || merge >= 1 << 15) throw py::value_error("merge must be in [1, 2^15)");
        const char* failure = nullptr;
        {
          const py::gil_scoped_release release;
          failure = qwen2vl::vision_positions_cuda(view, items, merge, patches, reinterpret_cast<int64_t*>(positions),
                                                   reinterpret_cast<int64_t*>(workspace), device,
                                                   reinterpret_cast<void*>(stream));
        }
        if (failure != nullptr) throw std::runtime_error(std::string("vision_positions: launch failed: ") + failure);
      },
      py::arg("grids"), py::arg("items"), py::arg("merge"), py::arg("patches"), py::arg("positions"),
      py::arg("workspace"), py::arg("device"), py::arg("stream"));

  // frames: see frame_job, with addresses in device memory; options: as for the CPU, the table in host memory. The last
  // two options do not matter here.
  m.def(
      "image_to_patches_workspace_bytes",
      [](const std::vector<qwen2vl::RawFrame>& frames, const std::array<int64_t, 6>& options) {
        const qwen2vl::PatchOptions checked = qwen2vl::patch_options(options, 1);
        return qwen2vl::image_to_patches_workspace_bytes(qwen2vl::frame_jobs(frames, checked), checked);
      },
      py::arg("frames"), py::arg("options"));

  m.def(
      "image_to_patches",
      [](const std::vector<qwen2vl::RawFrame>& frames, const std::array<int64_t, 6>& options, int64_t workspace,
         int device, int64_t stream) {
        const qwen2vl::PatchOptions checked = qwen2vl::patch_options(options, 1);
        const std::vector<qwen2vl::FrameJob> jobs = qwen2vl::frame_jobs(frames, checked);
        const char* failure = nullptr;
        {
          const py::gil_scoped_release release;
          failure = qwen2vl::image_to_patches_cuda(jobs, checked, reinterpret_cast<uint8_t*>(workspace), device,
                                                   reinterpret_cast<void*>(stream));
        }
        if (failure != nullptr) throw std::runtime_error(std::string("image_to_patches: launch failed: ") + failure);
      },
      py::arg("frames"), py::arg("options"), py::arg("workspace"), py::arg("device"), py::arg("stream"));

  // q, k, v: see attention_tensor. sizes: query heads, key heads, head width, 1 for float16 (0: bfloat16), causal.
  // config: see attention_shape. tiles: (address, count, width); bounds: the segments of bounds[0] < keys <= bounds[1]
  // are taken. scale: in powers of two.
  m.def(
      "attention_forward",
      [](const qwen2vl::RawHeads& q, const qwen2vl::RawHeads& k, const qwen2vl::RawHeads& v, int64_t out, int64_t lse,
         const std::array<int64_t, 3>& tiles, const std::array<int64_t, 5>& sizes, const qwen2vl::RawConfig& config,
         const std::array<int64_t, 2>& bounds, double scale, int device, int64_t stream) {
        const auto call = qwen2vl::attention_call(q, k, v, out, lse, tiles, sizes, config, bounds, scale);
        std::string failure;
        {
          const py::gil_scoped_release release;
          failure = qwen2vl::attention_forward_cuda(call, device, reinterpret_cast<void*>(stream));
        }
        if (!failure.empty()) throw std::runtime_error("attention_forward: launch failed: " + failure);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("tiles"), py::arg("sizes"),
      py::arg("config"), py::arg("bounds"), py::arg("scale"), py::arg("device"), py::arg("stream"));

  m.def("attention_built", [] {
    std::vector<std::array<int64_t, 9>> all;
    for (const auto& kernel : qwen2vl::attention_kernels()) {
      const auto& shape = kernel.shape;
      all.push_back({shape.head, kernel.fp16, kernel.causal, shape.consumers, shape.keys, shape.share, shape.p_shared,
                     shape.columns, shape.across});
    }
    return all;
  });

  m.def(
      "attention_load",
      [](const std::string& path, int64_t head, bool fp16, bool causal, const qwen2vl::RawConfig& config) {
        const auto shape = qwen2vl::attention_shape(head, config);
        const std::string failure = qwen2vl::attention_load(path, shape, fp16, causal);
        if (!failure.empty()) throw std::runtime_error("attention_load: " + failure);
      },
      py::arg("path"), py::arg("head"), py::arg("fp16"), py::arg("causal"), py::arg("config"),
      py::call_guard<py::gil_scoped_release>());
}
