// How a packed tensor of heads is told to TMA: a tensor map's numbers, by the terms of cuTensorMapEncodeTiled.
#pragma once

#include <array>
#include <cstdint>

#include "attention.h"

namespace qwen2vl {

struct AttentionMap {
  const void* data;
  uint32_t rank;
  uint64_t sizes[4];
  uint64_t strides[3];  // in bytes, of all dimensions but the first
  uint32_t box[4];
  int swizzle;  // in bytes
};

// The map whose boxes are `rows` rows of one head. Its first dimension is a block of columns, where a head is made of
// whole blocks the third is the block; else the first is the head, so that what lies behind it is read as zeros.
inline AttentionMap attention_map(const AttentionShape& shape, const AttentionTensor& tensor, int heads, int rows) {
  const auto columns = static_cast<uint32_t>(shape.columns), head = static_cast<uint32_t>(shape.head);
  const auto box_rows = static_cast<uint32_t>(rows), blocks = static_cast<uint32_t>(shape.blocks());
  const auto all_rows = static_cast<uint64_t>(tensor.rows), all_heads = static_cast<uint64_t>(heads);
  // Of one row or one head a stride may be anything, as nobody steps by it.
  const uint64_t row = tensor.rows > 1 ? static_cast<uint64_t>(tensor.row_stride) * 2 : uint64_t{2} * head;
  const uint64_t next = heads > 1 ? static_cast<uint64_t>(tensor.head_stride) * 2 : uint64_t{2} * head;
  if (shape.head == shape.width()) {
    return {tensor.data,
            4,
            {columns, all_rows, blocks, all_heads},
            {row, uint64_t{2} * columns, next},
            {columns, box_rows, blocks, 1},
            shape.row_bytes()};
  }
  return {tensor.data, 3, {head, all_rows, all_heads, 1}, {row, next, 0}, {columns, box_rows, 1, 1}, shape.row_bytes()};
}

// Every number that a map is made of, for who keeps maps: two that differ in any of them are two maps.
using AttentionMapKey = std::array<uint64_t, 15>;

inline AttentionMapKey attention_map_key(const AttentionMap& map, bool fp16) {
  return {reinterpret_cast<uint64_t>(map.data),
          map.rank,
          map.sizes[0],
          map.sizes[1],
          map.sizes[2],
          map.sizes[3],
          map.strides[0],
          map.strides[1],
          map.strides[2],
          map.box[0],
          map.box[1],
          map.box[2],
          map.box[3],
          static_cast<uint64_t>(map.swizzle),
          fp16};
}

}  // namespace qwen2vl
