#include "vision_positions.h"

#include <cuda_runtime.h>

#include "vision_positions.cuh"

namespace qwen2vl {

const char* vision_positions_cuda(const IntView& grids, int64_t items, int64_t merge, int64_t patches,
                                  int64_t* positions, int64_t* workspace, int device, void* stream) {
  if (patches == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  // PyTorch's device guard sets the device in PyTorch's copy of the CUDA runtime; this extension has its own.
  const cudaError_t chosen = cudaSetDevice(device);
  if (chosen != cudaSuccess) return cudaGetErrorString(chosen);
  vision_sums<<<1, kSumThreads, 0, on>>>(grids, items, merge, workspace);
  const auto blocks = static_cast<unsigned>((patches + kPlaceThreads - 1) / kPlaceThreads);
  vision_place<<<blocks, kPlaceThreads, 0, on>>>(grids, items, merge, workspace, patches,
                                                 reinterpret_cast<PatchPosition*>(positions));
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace qwen2vl
