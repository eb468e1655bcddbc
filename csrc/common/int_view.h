// A strided view of integers whose width is known at run time, so that tensors are read where they lie.
#pragma once

#include <cstdint>

#include "macros.h"

namespace qwen2vl {

struct IntView {
  const void* data;    // null: the optional tensor was not given
  int64_t item_size;   // bytes: 1, 4 or 8
  int64_t row_stride;  // in elements
  int64_t column_stride;

  QWEN2VL_HD bool given() const { return data != nullptr; }

  QWEN2VL_HD int64_t at(int64_t row, int64_t column) const {
    const int64_t offset = row * row_stride + column * column_stride;
    switch (item_size) {
      case 8:
        return static_cast<const int64_t*>(data)[offset];
      case 4:
        return static_cast<const int32_t*>(data)[offset];
      default:  // bool, int8, uint8: only ever asked whether it is zero
        return static_cast<const uint8_t*>(data)[offset];
    }
  }

  QWEN2VL_HD int64_t at(int64_t index) const { return at(0, index); }
};

}  // namespace qwen2vl
