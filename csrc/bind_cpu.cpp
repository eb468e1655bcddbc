// Python module qwen2vl_kernels._cpu: checks and exports only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "bind_frames.h"
#include "bind_quant.h"
#include "bind_step.h"
#include "bind_views.h"
#include "build_info.h"
#include "cpu/image_to_patches.h"
#include "cpu/mrope_positions.h"
#include "cpu/resample.h"
#include "cpu/vision_positions.h"

namespace py = pybind11;
using qwen2vl::RawView;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of qwen2vl_kernels. Tensors come as (address, bytes per element, row stride, column stride).";

  m.def("build_info", [] {
    return std::map<std::string, std::string>{{"version", QWEN2VL_VERSION},
                                              {"compiler", QWEN2VL_COMPILER},
                                              {"cuda", QWEN2VL_CUDA_STATUS},
                                              {"sm90", QWEN2VL_SM90_STATUS}};
  });

  // Returns (error, video, item, token, found): see MropeStatus.
  m.def(
      "mrope_positions",
      [](const RawView& ids, const RawView& mask, const RawView& image_grids, const RawView& video_grids,
         const RawView& cu_seqlens, const RawView& state, const std::array<int64_t, 5>& sizes,
         const std::array<int64_t, 3>& tokens, int64_t positions, int64_t delta, int64_t state_out) {
        const auto in = qwen2vl::mrope_input(ids, mask, image_grids, video_grids, cu_seqlens, state, sizes, tokens);
        qwen2vl::MropeStatus status;
        {
          const py::gil_scoped_release release;
          status = qwen2vl::mrope_positions(in, reinterpret_cast<int64_t*>(positions),
                                            reinterpret_cast<int64_t*>(delta), reinterpret_cast<int64_t*>(state_out));
        }
        return py::make_tuple(static_cast<int64_t>(status.error), status.video, status.item, status.token,
                              status.found);
      },
      py::arg("ids"), py::arg("mask"), py::arg("image_grids"), py::arg("video_grids"), py::arg("cu_seqlens"),
      py::arg("state"), py::arg("sizes"), py::arg("tokens"), py::arg("positions"), py::arg("delta"),
      py::arg("state_out"));

  // Returns (item, patches): see GridSum.
  m.def(
      "count_patches",
      [](const RawView& grids, int64_t items, int64_t merge, int64_t most) {
        if (items < 0 || merge < 1 || most < 0) throw py::value_error("items, merge and most must not be negative");
        const auto sum = qwen2vl::count_patches(qwen2vl::int_view("grids", grids), items, merge, most);
        return py::make_tuple(sum.item, sum.patches);
      },
      py::arg("grids"), py::arg("items"), py::arg("merge"), py::arg("most"));

  // `patches` is the room at `positions`; the grids are counted again, so that no caller can make them pass it.
  m.def(
      "vision_positions",
      [](const RawView& grids, int64_t items, int64_t merge, int64_t patches, int64_t positions) {
        const auto view = qwen2vl::int_view("grids", grids);
        if (items < 0 || merge < 1 || patches < 0)
          throw py::value_error("items, merge and patches must not be negative");
        if (qwen2vl::count_patches(view, items, merge, patches).patches != patches) {
          throw py::value_error("the grids do not hold that many patches");
        }
        const py::gil_scoped_release release;
        qwen2vl::vision_positions(view, items, merge, reinterpret_cast<int64_t*>(positions));
      },
      py::arg("grids"), py::arg("items"), py::arg("merge"), py::arg("patches"), py::arg("positions"));

  m.def("row_kernels", [] {
    std::vector<std::string> names;
    for (const qwen2vl::RowKernels& kernels : qwen2vl::row_kernels()) names.emplace_back(kernels.name);
    return names;
  });

  qwen2vl::bind_step(m);
  qwen2vl::bind_quant(m);

  // frames: see frame_job. options: patch, merge, PatchType, address of the table, threads, index of the row kernels.
  m.def(
      "image_to_patches",
      [](const std::vector<qwen2vl::RawFrame>& frames, const std::array<int64_t, 6>& options) {
        const qwen2vl::PatchOptions checked = qwen2vl::patch_options(options, qwen2vl::row_kernels().size());
        const std::vector<qwen2vl::FrameJob> jobs = qwen2vl::frame_jobs(frames, checked);
        const py::gil_scoped_release release;
        qwen2vl::image_to_patches(jobs, checked);
      },
      py::arg("frames"), py::arg("options"));
}
