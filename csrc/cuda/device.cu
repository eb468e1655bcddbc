#include "device.h"

#include <cuda_runtime.h>

namespace qwen2vl {
namespace {

__global__ void probe() {}  // compiled for the same architectures as every other kernel

}  // namespace

const char* device_problem(int device) {
  cudaError_t status = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, probe);
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // the next launch must not report this again
  return cudaGetErrorString(status);
}

}  // namespace qwen2vl
