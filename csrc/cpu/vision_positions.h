#pragma once

#include <cstdint>

#include "../common/int_view.h"

namespace qwen2vl {

// Patches of all grids, (items, 3): t, height, width. `item` is the first grid with an entry below one or with sides
// that `merge` does not divide, else -1; `patches` is -1 where the sum passes `most`.
struct GridSum {
  int64_t item, patches;
};

GridSum count_patches(const IntView& grids, int64_t items, int64_t merge, int64_t most);

// positions: (patches, 2), row and column of every patch in block order, for grids that count_patches accepts.
void vision_positions(const IntView& grids, int64_t items, int64_t merge, int64_t* positions);

}  // namespace qwen2vl
