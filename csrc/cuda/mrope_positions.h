#pragma once

#include <cstdint>

#include "../common/mrope.h"

namespace qwen2vl {

// Bytes of device memory that mrope_positions_cuda needs beside its outputs; 8-byte aligned.
int64_t mrope_workspace_bytes(int64_t tokens, int64_t images, int64_t videos, int64_t sequences);

// Two launches on `stream` (a cudaStream_t of `device`), no allocation and no synchronisation. positions: (3, rows,
// columns); delta: (sequences); state: (sequences, kStateSize) or null. All addresses are device memory. Returns null,
// or CUDA's words for why a launch failed.
const char* mrope_positions_cuda(const MropeInput& in, int64_t* positions, int64_t* delta, int64_t* state,
                                 int64_t* workspace, int device, void* stream);

}  // namespace qwen2vl
