// Where a pixel of a frame lies among its patches, shared by host and device.
//
// Patches of p x p pixels stand in merge blocks of m x m: block row, block column, row in block, column in block. The
// values of one patch run over channel, time slot, row, column; a frame fills one time slot, so it is written through
// two strides, from patch to patch and from channel to channel.
#pragma once

#include <cstdint>

#include "macros.h"

namespace qwen2vl {

struct PatchIndex {
  int32_t patch, merge;
  int32_t columns;  // of patches in a frame

  // Which row of the packed patches holds the patch at (row, column) of the frame's grid.
  QWEN2VL_HD int64_t packed_row(int32_t row, int32_t column) const {
    const int32_t block_row = row / merge, block_column = column / merge;
    const int64_t block = static_cast<int64_t>(block_row) * (columns / merge) + block_column;
    return (block * merge + (row - block_row * merge)) * merge + (column - block_column * merge);
  }

  // The inverse: (row, column) of the patch in a packed row.
  QWEN2VL_HD void grid_place(int64_t packed, int32_t* row, int32_t* column) const {
    const int32_t inside = static_cast<int32_t>(packed % (merge * merge));
    const int64_t block = packed / (merge * merge);
    const int32_t blocks = columns / merge;
    *row = static_cast<int32_t>(block / blocks) * merge + inside / merge;
    *column = static_cast<int32_t>(block % blocks) * merge + inside % merge;
  }
};

}  // namespace qwen2vl
