// Kernels of the patch coordinates: one block sums the grids, then every patch is placed on its own.
#pragma once

#include <cstdint>

#include "../common/mrope.h"
#include "../common/patch_index.h"
#include "block_scan.cuh"

namespace qwen2vl {

constexpr int kSumThreads = 256;
constexpr int kPlaceThreads = 256;

// A grid in patches; one that no image can have holds nothing.
QWEN2VL_HD inline Extent patch_extent(const IntView& grids, int64_t item, int64_t merge) {
  const Extent e = extent(grids, item, 1);
  return e.h % merge == 0 && e.w % merge == 0 ? e : Extent{0, 0, 0};
}

// ends: (items), patches up to and including each grid.
__global__ void __launch_bounds__(kSumThreads) vision_sums(IntView grids, int64_t items, int64_t merge, int64_t* ends) {
  __shared__ int64_t warp_sums[kSumThreads / kWarp];
  int64_t before = 0;
  for (int64_t base = 0; base < items; base += blockDim.x) {
    const int64_t item = base + threadIdx.x;
    const int64_t own = item < items ? patch_extent(grids, item, merge).tokens() : 0;
    int64_t all = 0;
    const int64_t left = block_exclusive_scan(own, warp_sums, &all);
    if (item < items) ends[item] = before + left + own;
    before += all;
  }
}

struct alignas(16) PatchPosition {
  int64_t row, column;
};

// One thread a patch, one store of 16 bytes; patches beyond the last grid get zeros.
__global__ void __launch_bounds__(kPlaceThreads)
    vision_place(IntView grids, int64_t items, int64_t merge, const int64_t* ends, int64_t patches,
                 PatchPosition* positions) {
  const int64_t patch = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (patch >= patches) return;
  const int64_t item = count_up_to(ends, items, patch);
  PatchPosition out{0, 0};
  if (item < items) {
    const Extent e = patch_extent(grids, item, merge);
    const int64_t index = patch - (item > 0 ? ends[item - 1] : 0);
    const PatchIndex frame{1, static_cast<int32_t>(merge), static_cast<int32_t>(e.w)};
    int32_t row = 0, column = 0;
    frame.grid_place(index % (e.h * e.w), &row, &column);
    out = {row, column};
  }
  positions[patch] = out;
}

}  // namespace qwen2vl
