// mbarriers in shared memory with arrivals, transaction bytes and phases, and the registers that warpgroups share.
#pragma once

#include "memory.h"

namespace on_host::sm90 {

struct Mbarrier {
  uint32_t address = 0;
  int64_t count = 0, pending = 0, bytes = 0;  // arrivals a phase, arrivals and bytes that this phase still waits for
  int32_t ended = 0;                          // phases
  int initialiser = 0;                        // thread
  int32_t fence_stamp = 0;                    // of the initialiser's fence.mbarrier_init; 0: none yet
  Clock arrived, clock;                       // of this phase's arrivals, and of the last phase's
};

struct Mbarriers {
  std::vector<Mbarrier> all;
  std::vector<int16_t> at;  // which one, for each 8 bytes of shared memory

  void reset() {
    all.clear();
    all.reserve(kMaxBarriers);
    at.assign(memory.size / 8 + 1, -1);
  }
};
static Mbarriers mbarriers;

// The mbarrier at an address, which this thread (or a copy that it issues) may use.
inline Mbarrier& mbarrier_of(uint32_t address, bool by_copy = false) {
  memory.check(address, 8, 8, "the mbarrier");
  const int16_t index = mbarriers.at[(address - kWindow) / 8];
  if (index < 0) ON_HOST_FAIL("no mbarrier was initialised at 0x%x", address);
  Mbarrier& barrier = mbarriers.all[index];
  const bool own = barrier.initialiser == static_cast<int>(threadIdx.x) && !by_copy;
  if (!own && barrier.fence_stamp == 0)
    ON_HOST_FAIL("the mbarrier at 0x%x is used before its fence.mbarrier_init", address);
  if (!own && order.stores(order.known(threadIdx.x), barrier.initialiser) < barrier.fence_stamp)
    ON_HOST_FAIL("this is not ordered behind the initialisation of the mbarrier at 0x%x", address);
  return barrier;
}
inline int index_of(const Mbarrier& barrier) { return static_cast<int>(&barrier - mbarriers.all.data()); }

inline void init_mbarrier(uint32_t address, uint32_t arrivals) {
  memory.check(address, 8, 8, "the mbarrier");
  if (arrivals == 0 || arrivals >= 1u << 20) ON_HOST_FAIL("an mbarrier of %u arrivals", arrivals);
  int16_t& index = mbarriers.at[(address - kWindow) / 8];
  if (index >= 0) ON_HOST_FAIL("the mbarrier at 0x%x is initialised twice", address);
  if (mbarriers.all.size() == kMaxBarriers) ON_HOST_FAIL("more than %u mbarriers", kMaxBarriers);
  Chunk& chunk = memory.chunk(address);
  if (chunk.written != Chunk::Written::kNever) ON_HOST_FAIL("the mbarrier lies in what %s", written_by(chunk).c_str());
  chunk.mbarrier = true;
  index = static_cast<int16_t>(mbarriers.all.size());
  Mbarrier barrier;
  barrier.address = address;
  barrier.count = barrier.pending = arrivals;
  barrier.initialiser = static_cast<int>(threadIdx.x);
  order.clear(barrier.arrived);
  order.clear(barrier.clock);
  mbarriers.all.push_back(barrier);
}

inline void fence_initialised() {
  for (Mbarrier& barrier : mbarriers.all)
    if (barrier.initialiser == static_cast<int>(threadIdx.x) && barrier.fence_stamp == 0)
      barrier.fence_stamp = order.stamps[threadIdx.x];
}

inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  ++barrier.ended;
  barrier.clock.swap(barrier.arrived);
  order.phases(barrier.clock.data(), index_of(barrier)) = barrier.ended;
  order.clear(barrier.arrived);
  wake();
}

inline void expect_bytes(uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = mbarrier_of(address);
  barrier.bytes += bytes;
  if (barrier.bytes >= 1 << 20) ON_HOST_FAIL("more than 2^20 - 1 bytes in a phase of the mbarrier at 0x%x", address);
}

inline void arrive(uint32_t address) {
  Mbarrier& barrier = mbarrier_of(address);
  if (barrier.pending == 0)
    ON_HOST_FAIL("phase %d of the mbarrier at 0x%x waits for %lld bytes, all of its %lld arrivals had come",
                 barrier.ended + 1, address, static_cast<long long>(barrier.bytes),
                 static_cast<long long>(barrier.count));
  order.release(threadIdx.x, barrier.arrived);
  --barrier.pending;
  end_phase_if_complete(barrier);
}

// A copy's bytes have landed.
inline void complete_bytes(Mbarrier& barrier, int64_t bytes) {
  barrier.bytes -= bytes;
  end_phase_if_complete(barrier);
}

struct PhaseWait final : Wait {
  int barrier;
  uint32_t parity;
  PhaseWait(int barrier, uint32_t parity) : barrier(barrier), parity(parity) {}
  bool over() const override { return (mbarriers.all[barrier].ended & 1) != static_cast<int>(parity); }
  std::string reason() const override {
    const Mbarrier& at = mbarriers.all[barrier];
    char text[200];
    std::snprintf(text, sizeof text,
                  "parity %u of the mbarrier at 0x%x, where %d phases have ended and this one waits for %lld of %lld "
                  "arrivals and %lld bytes",
                  parity, at.address, at.ended, static_cast<long long>(at.pending), static_cast<long long>(at.count),
                  static_cast<long long>(at.bytes));
    return text;
  }
};

inline void wait_phase(uint32_t address, uint32_t parity) {
  if (parity > 1) ON_HOST_FAIL("a parity of %u", parity);
  const int index = index_of(mbarrier_of(address));
  wait_for(PhaseWait(index, parity));
  order.acquire(threadIdx.x, mbarriers.all[index].clock);
}

// ------------------------------------------------------------------------------------------------------------
// registers

struct Registers {
  int64_t free = 0;
  std::vector<int> of_warp;  // that a thread of each warp may use

  void reset(unsigned threads) {
    const int each = static_cast<int>(65536 / threads / 8 * 8);
    of_warp.assign(threads / kWarp, each < 255 ? each : 255);
    free = 0;  // a block's pool is what it was launched with
  }
};
static Registers registers;

struct RegistersWait final : Wait {
  int64_t wanted;
  explicit RegistersWait(int64_t wanted) : wanted(wanted) {}
  bool over() const override { return registers.free >= wanted; }
  std::string reason() const override {
    return std::to_string(wanted) + " registers for its warp, " + std::to_string(registers.free) + " are free";
  }
};

// setmaxnreg by one warp; `more`: whether it is the instruction that takes.
inline void set_registers(int count, bool more) {
  if (count % 8 != 0 || count < 24 || count > 256) ON_HOST_FAIL("%d registers: no multiple of 8 in 24 .. 256", count);
  struct Slot {
    int64_t wanted;
  } slot{0};
  const unsigned warp = threadIdx.x / kWarp;
  meet(0xffffffffu, slot, [=](Slot* const* slots, unsigned) {
    const int has = registers.of_warp[warp];
    if (more ? count < has : count > has)
      ON_HOST_FAIL("setmaxnreg.%s to %d from %d registers", more ? "inc" : "dec", count, has);
    slots[0]->wanted = static_cast<int64_t>(kWarp) * (count - has);
    if (more) return;
    registers.free -= slots[0]->wanted;
    registers.of_warp[warp] = count;
    wake();
  });
  // Lane 0 takes for its warp; the others need not wait, as nothing counts what they use.
  if (!more || threadIdx.x % kWarp != 0) return;
  wait_for(RegistersWait(slot.wanted));
  registers.free -= slot.wanted;
  registers.of_warp[warp] = count;
}

}  // namespace on_host::sm90
