// The shared memory of a block in its own window of 32-bit addresses, with who wrote and who reads each 16 bytes.
//
// What nothing has written is NaN. A read of what another thread, or a copy, wrote must come after that write by what
// synchronises, and so must a write over what a thread or a wgmma reads; else the program ends, whether or not the
// values happened to be right.
#pragma once

#include "../cuda_on_host.h"

namespace on_host::sm90 {

constexpr uint32_t kWindow = 1024;  // where dynamic shared memory begins: what is below belongs to the system
constexpr uint32_t kChunk = 16;
constexpr unsigned kMaxGroups = 8, kMaxBarriers = 64;

struct Chunk {
  enum class Written : uint8_t { kNever, kByThread, kByCopy };
  Written written = Written::kNever;
  bool landing = false;   // a copy has been issued and not landed
  bool mbarrier = false;  // holds one
  int16_t writer = -1;    // thread, or the mbarrier of a copy
  int32_t stamp = 0;      // of the writer's store, or the phase of the mbarrier that says that the copy is there
  int32_t read_by[kMaxGroups] = {};              // up to which wgmma of each warpgroup (counted from 1) it is read
  Where where;                                   // of the write
  std::vector<std::pair<int, int32_t>> readers;  // since then: threads, and the stamps of their loads
};

struct Memory {
  char* bytes = nullptr;
  uint32_t size = 0;
  std::vector<Chunk> chunks;

  void reset(size_t count) {
    allocate_shared(count);
    bytes = dynamic_shared.get();
    // Kernels get addresses that nobody can read or write, so that all accesses pass through this.
    static void* const window = mmap(nullptr, 1 << 18, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    dynamic_shared_window = static_cast<char*>(window);
    size = static_cast<uint32_t>(count);
    std::memset(bytes, 0xff, count);  // NaN in every format
    chunks.assign((count + kChunk - 1) / kChunk, Chunk());
  }
  void check(uint32_t address, uint32_t count, uint32_t alignment, const char* what) const {
    if (address % alignment != 0) ON_HOST_FAIL("%s at 0x%x is not aligned to %u bytes", what, address, alignment);
    if (address < kWindow || address - kWindow > size || count > size - (address - kWindow))
      ON_HOST_FAIL("%s at 0x%x, %u bytes, leaves the %u bytes of shared memory at 0x%x", what, address, count, size,
                   kWindow);
  }
  char* at(uint32_t address) const { return bytes + (address - kWindow); }
  Chunk& chunk(uint32_t address) { return chunks[(address - kWindow) / kChunk]; }
};
static Memory memory;

// A 16-byte chunk's address in a tile whose rows of `swizzle` bytes are swizzled: TMA and wgmma turn the same bits.
inline uint32_t swizzled(uint32_t address, unsigned swizzle) { return address ^ (address >> 3 & (swizzle - 16)); }

inline std::string written_by(const Chunk& chunk) {
  char text[160];
  if (chunk.written == Chunk::Written::kByThread)
    std::snprintf(text, sizeof text, "thread %d wrote at %s:%d", chunk.writer, base_name(chunk.where.file),
                  chunk.where.line);
  else
    std::snprintf(text, sizeof text, "the copy issued at %s:%d writes (phase %d of mbarrier %d)",
                  base_name(chunk.where.file), chunk.where.line, chunk.stamp, chunk.writer);
  return text;
}

// Fails unless a chunk's last write comes before what the thread of this clock does; by_async: as wgmma and TMA see it.
inline void check_written(const Chunk& chunk, uint32_t address, int32_t* clock, bool by_async, const char* what) {
  if (chunk.mbarrier) ON_HOST_FAIL("%s touches the mbarrier at 0x%x", what, address);
  if (chunk.written == Chunk::Written::kNever) return;
  if (chunk.written == Chunk::Written::kByCopy) {
    if (chunk.landing || order.phases(clock, chunk.writer) < chunk.stamp)
      ON_HOST_FAIL("%s at 0x%x does not wait for what %s", what, address, written_by(chunk).c_str());
  } else if (order.stores(clock, chunk.writer) < chunk.stamp) {
    ON_HOST_FAIL("%s at 0x%x is not ordered behind what %s", what, address, written_by(chunk).c_str());
  } else if (by_async && order.fenced(clock, chunk.writer) < chunk.stamp) {
    ON_HOST_FAIL("%s at 0x%x sees no fence.proxy.async after what %s", what, address, written_by(chunk).c_str());
  }
}

// Fails unless everything that reads a chunk comes before what the thread of this clock writes.
inline void check_read(const Chunk& chunk, uint32_t address, int32_t* clock, const char* what) {
  for (unsigned group = 0; group < blockDim.x / 128; ++group)
    if (chunk.read_by[group] > order.ended(clock, group))
      ON_HOST_FAIL("%s at 0x%x is not ordered behind wgmma %d of warpgroup %u, which reads there", what, address,
                   chunk.read_by[group], group);
  for (const auto& [thread, stamp] : chunk.readers)
    if (order.stores(clock, static_cast<size_t>(thread)) < stamp)
      ON_HOST_FAIL("%s at 0x%x is not ordered behind thread %d, which reads there", what, address, thread);
}

// Marks a chunk as written by a thread through the generic proxy.
inline void note_store(uint32_t address, unsigned thread, Where where, const char* what) {
  Chunk& chunk = memory.chunk(address);
  int32_t* const clock = order.known(thread);
  check_written(chunk, address, clock, false, what);
  check_read(chunk, address, clock, what);
  chunk.written = Chunk::Written::kByThread;
  chunk.writer = static_cast<int16_t>(thread);
  chunk.stamp = order.stamps[thread];
  chunk.readers.clear();
  chunk.where = where;
}

inline void store(uint32_t address, uint4 value, Where where) {
  memory.check(address, 16, 16, "the store");
  note_store(address, threadIdx.x, where, "the store");
  std::memcpy(memory.at(address), &value, 16);
}

inline uint4 load(uint32_t address) {
  memory.check(address, 16, 16, "the load");
  Chunk& chunk = memory.chunk(address);
  check_written(chunk, address, order.known(threadIdx.x), false, "the load");
  chunk.readers.emplace_back(threadIdx.x, order.stamps[threadIdx.x]);
  uint4 value;
  std::memcpy(&value, memory.at(address), 16);
  return value;
}

// stmatrix: lane 8 m + r says where row r of matrix m goes; lane 4 r + c holds columns 2 c and 2 c + 1 of row r.
inline void store_matrices(unsigned matrices, uint32_t address, const uint32_t* fragments, Where where) {
  struct Slot {
    uint32_t address;
    const uint32_t* fragments;
    unsigned thread;
  } slot{address, fragments, threadIdx.x};
  meet(0xffffffffu, slot, [matrices, where](Slot* const* slots, unsigned) {
    for (unsigned row = 0; row < 8 * matrices; ++row) {
      uint32_t numbers[4];
      for (unsigned c = 0; c < 4; ++c) numbers[c] = slots[4 * (row % 8) + c]->fragments[row / 8];
      memory.check(slots[row]->address, 16, 16, "a row of stmatrix");
      note_store(slots[row]->address, slots[row]->thread, where, "a row of stmatrix");
      std::memcpy(memory.at(slots[row]->address), numbers, 16);
    }
  });
}

}  // namespace on_host::sm90
