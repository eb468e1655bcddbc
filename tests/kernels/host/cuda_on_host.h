// Runs CUDA kernels on the CPU, one block at a time, so that their logic is tested where there is no GPU.
//
// The threads of a block are fibers (fibers.h). What the lanes of a warp do together happens when the last of them has
// come; a barrier counts warps, as the hardware does.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "fibers.h"
#include "order.h"

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define QWEN2VL_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(on_host::dynamic_shared_window)

namespace on_host {

struct FreeShared {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(1024)); }
};
static std::unique_ptr<char[], FreeShared> dynamic_shared;
static char* dynamic_shared_window = nullptr;  // what a kernel sees: the memory itself, or for Hopper nothing to read

// Not a byte more than asked for, so that the address sanitizer sees what leaves it.
inline void allocate_shared(size_t bytes) {
  dynamic_shared.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t(1024))));
  dynamic_shared_window = dynamic_shared.get();
}

// -------------------------------------------------------------------------------------- what lanes of a warp do
// together

struct Meeting {
  const char* call = nullptr;
  unsigned mask = 0, arrived = 0;
  bool living = false;  // lanes that have left are not waited for
  uint64_t ended = 0;
  void* slots[kWarp];
  std::function<void()> act;

  void end() {
    act();
    arrived = 0;
    ++ended;
  }
};

struct Warp {
  unsigned alive = 0;
  std::vector<Meeting> meetings = std::vector<Meeting>(kWarp);
};
static std::vector<Warp> warps;

struct MeetingWait final : Wait {
  const Meeting* meeting;
  uint64_t ended;
  MeetingWait(const Meeting* meeting, uint64_t ended) : meeting(meeting), ended(ended) {}
  bool over() const override { return meeting->ended != ended; }
  std::string reason() const override {
    char text[64];
    std::snprintf(text, sizeof text, "lanes %08x of the warp have not come", meeting->mask & ~meeting->arrived);
    return text;
  }
};

// The lanes of `mask` meet; the last to come runs act(slots), a pointer to each lane's slot, for all of them.
// A mask of 0 stands for all lanes that have not left the kernel.
template <class Slot, class Act>
void meet(unsigned mask, Slot& slot, Act act) {
  const unsigned lane = threadIdx.x % kWarp;
  Warp& warp = warps[threadIdx.x / kWarp];
  const bool living = mask == 0;
  if (living) mask = warp.alive;
  if ((mask >> lane & 1) == 0) ON_HOST_FAIL("lane %u is not in its own mask %08x", lane, mask);
  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if (other.arrived != 0 && (other.mask & mask) != 0) {
      if (other.mask != mask || std::strcmp(other.call, current().call) != 0)
        ON_HOST_FAIL("lanes %08x of this warp are at %s with mask %08x", other.arrived, other.call, other.mask);
      meeting = &other;
    }
  }
  if (meeting == nullptr) {
    for (Meeting& other : warp.meetings)
      if (other.arrived == 0) meeting = &other;
    meeting->call = current().call;
    meeting->mask = mask;
    meeting->living = living;
    meeting->act = [meeting, act] { act(reinterpret_cast<Slot* const*>(meeting->slots), meeting->mask); };
  }
  meeting->arrived |= 1u << lane;
  meeting->slots[lane] = &slot;
  if (meeting->arrived == meeting->mask) {
    meeting->end();
    return;
  }
  wait_for(MeetingWait(meeting, meeting->ended));
}

inline void leave_warp() {
  const unsigned bit = 1u << threadIdx.x % kWarp;
  Warp& warp = warps[threadIdx.x / kWarp];
  warp.alive &= ~bit;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.arrived == 0 || !meeting.living) continue;
    meeting.mask &= ~bit;
    if (meeting.arrived == meeting.mask) meeting.end();
  }
}

// --------------------------------------------------------------------------------------------------- barriers of a
// block

struct Barrier {
  unsigned expected = 0, arrived = 0;  // threads
  uint64_t ended = 0;
  std::vector<unsigned> waiting;  // threads
  Clock clock;
};
static std::vector<Barrier> barriers;  // 16 a block; 0 is that of __syncthreads

struct BarrierWait final : Wait {
  unsigned barrier;
  uint64_t ended;
  BarrierWait(unsigned barrier, uint64_t ended) : barrier(barrier), ended(ended) {}
  bool over() const override { return barriers[barrier].ended != ended; }
  std::string reason() const override {
    return "barrier " + std::to_string(barrier) + " has " + std::to_string(barriers[barrier].arrived) + " threads of " +
           std::to_string(barriers[barrier].expected);
  }
};

// A warp comes to a barrier of `threads` in all, as 32 threads however many of its lanes are left.
inline void come_to_barrier(unsigned barrier, unsigned threads, bool wait) {
  if (barrier >= barriers.size()) ON_HOST_FAIL("barrier %u, a block has 16", barrier);
  if (threads == 0 || threads % kWarp != 0) ON_HOST_FAIL("%u threads are no whole warps", threads);
  struct Slot {
    unsigned barrier, threads, thread;
    uint64_t ended;
  } slot{barrier, threads, threadIdx.x, 0};
  meet(0, slot, [wait](Slot* const* slots, unsigned mask) {
    Slot* first = nullptr;
    Barrier* at = nullptr;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      if (first == nullptr) {
        first = slots[lane];
        at = &barriers[first->barrier];
        if (at->arrived == 0) at->expected = first->threads, order.clear(at->clock);
      }
      if (slots[lane]->barrier != first->barrier || slots[lane]->threads != first->threads)
        ON_HOST_FAIL("lanes of one warp name different barriers or numbers of threads");
      slots[lane]->ended = at->ended;
      if (wait) at->waiting.push_back(slots[lane]->thread);
      order.release(slots[lane]->thread, at->clock);
    }
    if (at->expected != first->threads)
      ON_HOST_FAIL("barrier %u waits for %u threads, this warp says %u", first->barrier, at->expected, first->threads);
    at->arrived += kWarp;
    if (at->arrived < at->expected) return;
    if (at->waiting.empty()) ON_HOST_FAIL("all %u threads only arrive at barrier %u", at->expected, first->barrier);
    for (const unsigned thread : at->waiting) order.acquire(thread, at->clock);
    at->waiting.clear();
    at->arrived = 0;
    ++at->ended;
    wake();
  });
  if (wait) wait_for(BarrierWait(barrier, slot.ended));
}

// ----------------------------------------------------------------------------------------------------- blocks and
// grids

inline void run_block(unsigned block, unsigned threads, const std::function<void()>& kernel) {
  static const bool once = (engine.at_exit.push_back(leave_warp), true);
  (void)once;
  blockIdx.x = block;
  blockDim = {threads, 1, 1};
  warps.assign((threads + kWarp - 1) / kWarp, Warp());
  for (unsigned thread = 0; thread < threads; ++thread) warps[thread / kWarp].alive |= 1u << thread % kWarp;
  barriers.assign(16, Barrier());
  run_threads(threads, kernel);
}

// Blocks (x, y) one after the other, each with `shared_bytes` of dynamic shared memory and not a byte more.
inline void run_grid(unsigned blocks, unsigned rows, unsigned threads, size_t shared_bytes,
                     const std::function<void()>& kernel) {
  gridDim = {blocks, rows, 1};
  for (blockIdx.y = 0; blockIdx.y < rows; ++blockIdx.y) {
    for (unsigned block = 0; block < blocks; ++block) {
      allocate_shared(shared_bytes);
      run_block(block, threads, kernel);
    }
  }
  blockIdx.y = 0;
}

// The value that each lane of the mask gets when source(lane) says whose; its own where that one is not in the mask.
template <class T, class Source>
T exchange(unsigned mask, T value, Source source) {
  struct Slot {
    T given, got;
  } slot{value, value};
  meet(mask, slot, [source](Slot* const* slots, unsigned mask) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      const int from = source(static_cast<int>(lane));
      slots[lane]->got = from >= 0 && from < 32 && (mask >> from & 1) != 0 ? slots[from]->given : slots[lane]->given;
    }
  });
  return slot.got;
}

}  // namespace on_host

inline void __syncthreads(on_host::Where where = on_host::Where::here()) {
  if (!on_host::passes("__syncthreads", where)) return;
  on_host::come_to_barrier(0, (blockDim.x + 31) / 32 * 32, true);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, on_host::Where where = on_host::Where::here()) {
  if (!on_host::passes("__syncwarp", where)) return;
  unsigned thread = threadIdx.x;
  on_host::meet(mask, thread, [](unsigned* const* threads, unsigned mask) {
    on_host::Clock clock;
    on_host::order.clear(clock);
    for (unsigned lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) on_host::order.release(*threads[lane], clock);
    for (unsigned lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) on_host::order.acquire(*threads[lane], clock);
  });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int = 32, on_host::Where where = on_host::Where::here()) {
  on_host::passes("__shfl_sync", where);
  // Lanes may ask for different ones, so each says which.
  struct Slot {
    T given, got;
    int from;
  } slot{value, value, lane & 31};
  on_host::meet(mask, slot, [](Slot* const* slots, unsigned mask) {
    for (unsigned lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1) != 0 && (mask >> slots[lane]->from & 1) != 0)
        slots[lane]->got = slots[slots[lane]->from]->given;
  });
  return slot.got;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int = 32, on_host::Where where = on_host::Where::here()) {
  on_host::passes("__shfl_xor_sync", where);
  return on_host::exchange(mask, value, [other](int lane) { return lane ^ other; });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int = 32, on_host::Where where = on_host::Where::here()) {
  on_host::passes("__shfl_up_sync", where);
  return on_host::exchange(mask, value, [distance](int lane) { return lane - distance; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, on_host::Where where = on_host::Where::here()) {
  on_host::passes("__ballot_sync", where);
  struct Slot {
    bool predicate;
    unsigned ballot;
  } slot{predicate != 0, 0};
  on_host::meet(mask, slot, [](Slot* const* slots, unsigned mask) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1) != 0 && slots[lane]->predicate) ballot |= 1u << lane;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) slots[lane]->ballot = ballot;
  });
  return slot.ballot;
}

inline int __any_sync(unsigned mask, int predicate, on_host::Where where = on_host::Where::here()) {
  return __ballot_sync(mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, on_host::Where where = on_host::Where::here()) {
  return __ballot_sync(mask, predicate == 0, where) == 0;
}

// ---------------------------------------------------------------------------------------------- CUDA's types and
// numbers

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __int_as_float(int value) { return bits_as<float>(value); }
inline float __uint_as_float(unsigned value) { return bits_as<float>(value); }
inline int __float_as_int(float value) { return bits_as<int>(value); }
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
