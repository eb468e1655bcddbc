#include <cuda_runtime.h>

#include "image_to_patches_plan.h"

namespace qwen2vl {
namespace {

struct Launcher {
  cudaStream_t stream;

  template <class... Taken, class... Given>
  void operator()(void (*kernel)(Taken...), Grid grid, const Given&... given) const {
    const dim3 blocks(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.frames));
    kernel<<<blocks, kPatchThreads, static_cast<size_t>(grid.shared_bytes), stream>>>(given...);
  }
};

}  // namespace

int64_t image_to_patches_workspace_bytes(const std::vector<FrameJob>& jobs, const PatchOptions& options) {
  return workspace_bytes(jobs, options, FrameLimits{});
}

const char* image_to_patches_cuda(const std::vector<FrameJob>& jobs, const PatchOptions& options, uint8_t* workspace,
                                  int device, void* stream) {
  if (jobs.empty()) return nullptr;
  // PyTorch's device guard sets the device in PyTorch's copy of the CUDA runtime; this extension has its own.
  const cudaError_t chosen = cudaSetDevice(device);
  if (chosen != cudaSuccess) return cudaGetErrorString(chosen);
  const bool fits = enqueue(jobs, options, FrameLimits{}, workspace, Launcher{static_cast<cudaStream_t>(stream)});
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return fits ? nullptr : "a frame needs more blocks than one launch has";
}

}  // namespace qwen2vl
