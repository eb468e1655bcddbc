#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/image_to_patches.h"

namespace qwen2vl {

// Bytes of device memory that image_to_patches_cuda needs beside its outputs; 16-byte aligned.
int64_t image_to_patches_workspace_bytes(const std::vector<FrameJob>& jobs, const PatchOptions& options);

// The CPU's image_to_patches, byte for byte, as launches on `stream` (a cudaStream_t of `device`): no allocation, no
// copy, no synchronisation. Pixels and outputs are device memory, `options.table` is host memory and read before this
// returns. Returns null, or CUDA's words for why a launch failed.
const char* image_to_patches_cuda(const std::vector<FrameJob>& jobs, const PatchOptions& options, uint8_t* workspace,
                                  int device, void* stream);

}  // namespace qwen2vl
