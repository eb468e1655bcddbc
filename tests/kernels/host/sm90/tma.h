// Tensor maps, and copies that land in pieces at some moment before their bytes are counted.
#pragma once

#include "barriers.h"

namespace on_host::sm90 {

// What cuTensorMapEncodeTiled is told, for elements of 16 bits, no interleaving, zeros out of bounds.
struct TensorMap {
  const void* address = nullptr;
  unsigned rank = 0;
  uint64_t dims[5] = {};          // elements, the contiguous dimension first
  uint64_t stride_bytes[4] = {};  // of dimension 1 and up
  uint32_t box[5] = {};
  unsigned swizzle = 0;  // bytes: 32, 64, 128
};

[[noreturn]] inline void refuse_map(const char* what) {
  std::fprintf(stderr, "tensor map: %s\n", what);
  std::_Exit(kFailed);
}

// The map of what has the numbers of cuTensorMapEncodeTiled's arguments: data, rank, sizes, strides (in bytes), box and
// swizzle (in bytes). Ends the program where that function would refuse.
template <class Numbers>
TensorMap tensor_map(const Numbers& numbers) {
  TensorMap map;
  map.address = numbers.data;
  map.rank = static_cast<unsigned>(numbers.rank);
  map.swizzle = static_cast<unsigned>(numbers.swizzle);
  if (reinterpret_cast<uintptr_t>(map.address) % 16 != 0) refuse_map("the address is not a multiple of 16 bytes");
  if (map.rank < 1 || map.rank > 5) refuse_map("a rank that is not in 1 .. 5");
  if (map.swizzle != 32 && map.swizzle != 64 && map.swizzle != 128)
    refuse_map("a swizzle that is not 32, 64 or 128 bytes");
  for (unsigned i = 0; i < map.rank; ++i) {
    map.dims[i] = numbers.sizes[i];
    map.box[i] = numbers.box[i];
    if (map.dims[i] == 0 || map.dims[i] > 1ull << 32) refuse_map("a dimension that is not in 1 .. 2^32");
    if (map.box[i] == 0 || map.box[i] > 256) refuse_map("a box that is not in 1 .. 256");
    if (i == 0) continue;
    map.stride_bytes[i - 1] = numbers.strides[i - 1];
    if (map.stride_bytes[i - 1] % 16 != 0 || map.stride_bytes[i - 1] >= 1ull << 40)
      refuse_map("a stride that is not a multiple of 16 bytes below 2^40");
  }
  if (2 * map.box[0] != map.swizzle) refuse_map("rows of a box that are not as wide as the swizzle");
  return map;
}

struct Copy {
  TensorMap map;
  uint32_t to = 0;
  int64_t coordinates[5] = {};
  int barrier = 0;
  Where where;
  std::vector<uint32_t> rows;  // that have not landed, in the order in which they will, the last one first
};

struct Copies final : Source {
  std::vector<Copy> all;

  bool pending() const override { return !all.empty(); }

  void land(Copy& copy, uint32_t row) {
    const TensorMap& map = copy.map;
    const int64_t width = map.box[0];
    uint64_t offset = 0, rest = row;
    bool inside = true;
    for (unsigned i = 1; i < map.rank; ++i) {
      const int64_t at = copy.coordinates[i] + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      if (at < 0 || at >= static_cast<int64_t>(map.dims[i])) inside = false;
      if (inside) offset += static_cast<uint64_t>(at) * map.stride_bytes[i - 1];
    }
    uint16_t numbers[64] = {};
    const auto* const from = reinterpret_cast<const uint16_t*>(static_cast<const char*>(map.address) + offset);
    for (int64_t i = 0; inside && i < width; ++i) {
      const int64_t at = copy.coordinates[0] + i;
      if (at >= 0 && at < static_cast<int64_t>(map.dims[0])) numbers[i] = from[at];
    }
    for (uint32_t i = 0; i < 2 * map.box[0]; i += kChunk) {
      const uint32_t address = swizzled(copy.to + row * 2 * map.box[0] + i, map.swizzle);
      std::memcpy(memory.at(address), reinterpret_cast<const char*>(numbers) + i, kChunk);
      memory.chunk(address).landing = false;
    }
  }

  // Some rows of one copy, or all that are left.
  void step() override {
    const unsigned which = random_below(static_cast<unsigned>(all.size()));
    Copy& copy = all[which];
    const auto left = static_cast<uint32_t>(copy.rows.size());
    uint32_t rows = random_below(4) == 0 ? 1 + random_below(left) : left;
    int64_t bytes = 0;
    for (; rows > 0; --rows, copy.rows.pop_back(), bytes += 2 * copy.map.box[0]) land(copy, copy.rows.back());
    const int barrier = copy.barrier;
    if (copy.rows.empty()) {
      std::swap(all[which], all.back());
      all.pop_back();
    }
    complete_bytes(mbarriers.all[barrier], bytes);
  }
};
static Copies copies;

// From the issue on the destination holds NaN.
inline void issue_copy(uint32_t to, const TensorMap& given, uint32_t barrier_address, unsigned rank,
                       const int* coordinates, Where where) {
  Copy copy;
  copy.map = given;
  copy.where = where;
  if (options.mutate == "swizzle") copy.map.swizzle = given.swizzle == 32 ? 64 : given.swizzle / 2;
  if (rank != given.rank) ON_HOST_FAIL("%u coordinates for a map of rank %u", rank, given.rank);
  uint32_t rows = 1;
  for (unsigned i = 0; i < rank; ++i) {
    copy.coordinates[i] = coordinates[i];
    if (i > 0) rows *= given.box[i];
  }
  // A box of rows as wide as the swizzle repeats after 8 of them.
  memory.check(to, rows * given.swizzle, std::max(128u, 8 * given.swizzle), "the copy's destination");
  Mbarrier& barrier = mbarrier_of(barrier_address, true);
  copy.to = to;
  copy.barrier = index_of(barrier);
  int32_t* const clock = order.known(threadIdx.x);
  for (uint32_t address = to; address < to + rows * given.swizzle; address += kChunk) {
    Chunk& chunk = memory.chunk(address);
    check_written(chunk, address, clock, true, "the copy");
    check_read(chunk, address, clock, "the copy");
    chunk.written = Chunk::Written::kByCopy;
    chunk.landing = true;
    chunk.writer = static_cast<int16_t>(copy.barrier);
    chunk.stamp = barrier.ended + 1;
    chunk.readers.clear();
    chunk.where = where;
  }
  std::memset(memory.at(to), 0xff, rows * given.swizzle);
  copy.rows.resize(rows);
  for (uint32_t row = 0; row < rows; ++row) {
    const uint32_t other = random_below(row + 1);
    copy.rows[row] = copy.rows[other];
    copy.rows[other] = row;
  }
  copies.all.push_back(copy);
  while (now.timing == Timing::kEarly && copies.pending()) copies.step();
}

}  // namespace on_host::sm90
