#include "mrope_positions.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "mrope_positions.cuh"

namespace qwen2vl {

int64_t mrope_workspace_bytes(int64_t tokens, int64_t images, int64_t videos, int64_t sequences) {
  return MropeWorkspace::bytes(tokens, images, videos, sequences);
}

const char* mrope_positions_cuda(const MropeInput& in, int64_t* positions, int64_t* delta, int64_t* state,
                                 int64_t* workspace, int device, void* stream) {
  const auto memory = MropeWorkspace::at(workspace, in.images, in.videos, in.sequences);
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t work = std::max(in.tokens(), in.sequences);
  if (work == 0) return nullptr;
  // PyTorch's device guard sets the device in PyTorch's copy of the CUDA runtime; this extension has its own.
  const cudaError_t chosen = cudaSetDevice(device);
  if (chosen != cudaSuccess) return cudaGetErrorString(chosen);
  mrope_scan<<<1, kScanThreads, 0, on>>>(in, memory);
  const auto blocks = static_cast<unsigned>((work + kFillThreads - 1) / kFillThreads);
  mrope_fill<<<blocks, kFillThreads, 0, on>>>(in, memory, positions, delta, state);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace qwen2vl
