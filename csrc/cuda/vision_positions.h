#pragma once

#include <cstdint>

#include "../common/int_view.h"

namespace qwen2vl {

// Two launches on `stream` (a cudaStream_t of `device`), no allocation and no synchronisation. grids: (items, 3);
// positions: (patches, 2), 16-byte aligned; workspace: one number a grid. All addresses are device memory; contents are
// not checked: grids that no image can have hold nothing, patches beyond the last grid get zeros. `merge` stays below
// 2^15. Returns null, or CUDA's words for why a launch failed.
const char* vision_positions_cuda(const IntView& grids, int64_t items, int64_t merge, int64_t patches,
                                  int64_t* positions, int64_t* workspace, int device, void* stream);

}  // namespace qwen2vl
