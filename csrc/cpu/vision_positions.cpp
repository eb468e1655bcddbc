#include "vision_positions.h"

#include <cstring>

namespace qwen2vl {

GridSum count_patches(const IntView& grids, int64_t items, int64_t merge, int64_t most) {
  int64_t patches = 0;
  for (int64_t item = 0; item < items; ++item) {
    const int64_t t = grids.at(item, 0), height = grids.at(item, 1), width = grids.at(item, 2);
    if (t < 1 || height < 1 || width < 1 || height % merge != 0 || width % merge != 0) return {item, -1};
    // Divisions instead of products, which could overflow.
    if (patches < 0 || height > most / width || t > (most - patches) / (height * width)) {
      patches = -1;
    } else {
      patches += t * height * width;
    }
  }
  return {-1, patches};
}

void vision_positions(const IntView& grids, int64_t items, int64_t merge, int64_t* positions) {
  for (int64_t item = 0; item < items; ++item) {
    const int64_t t = grids.at(item, 0), height = grids.at(item, 1), width = grids.at(item, 2);
    const int64_t* const frame = positions;
    for (int64_t top = 0; top < height; top += merge) {
      for (int64_t left = 0; left < width; left += merge) {
        for (int64_t row = top; row < top + merge; ++row) {
          for (int64_t column = left; column < left + merge; ++column) {
            *positions++ = row;
            *positions++ = column;
          }
        }
      }
    }
    const int64_t values = 2 * height * width;
    for (int64_t step = 1; step < t; ++step, positions += values) {
      std::memcpy(positions, frame, static_cast<size_t>(values) * sizeof(int64_t));
    }
  }
}

}  // namespace qwen2vl
