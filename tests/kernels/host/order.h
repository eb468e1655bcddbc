// Which thread's accesses to shared memory come before which: vector clocks.
//
// A thread's clock says of every thread up to which of its stores this thread comes after, and up to which of those
// that were fenced for the async proxy; of every mbarrier, how many phases it has seen the end of; of every warpgroup,
// how many of its wgmma it knows to have ended. What synchronises hands clocks on: release() into a barrier's clock,
// acquire() from it. Off (clocks without entries) until configured for a block.
#pragma once

#include <cstdint>
#include <vector>

namespace on_host {

using Clock = std::vector<int32_t>;

#define ON_HOST_FAST __attribute__((optimize("O3"), no_sanitize("address", "undefined")))

ON_HOST_FAST inline void raise_to(int32_t* to, const int32_t* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = to[i] < from[i] ? from[i] : to[i];
}

ON_HOST_FAST inline void lower_to(int32_t* to, const int32_t* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = from[i] < to[i] ? from[i] : to[i];
}

struct Order {
  size_t threads = 0, entries = 0, phases_at = 0, ended_at = 0;
  std::vector<int32_t> clocks;  // a row of entries for each thread
  std::vector<int32_t> stamps;  // the stamp of a thread's stores: goes up at each release and fence

  void configure(size_t thread_count, size_t mbarriers, size_t warpgroups) {
    threads = thread_count;
    phases_at = 2 * threads;
    ended_at = phases_at + mbarriers;
    entries = thread_count == 0 ? 0 : ended_at + warpgroups;
    clocks.assign(threads * entries, 0);
    stamps.assign(threads, 1);
  }
  int32_t* of(size_t thread) { return clocks.data() + thread * entries; }
  int32_t& stores(int32_t* clock, size_t thread) const { return clock[thread]; }
  int32_t& fenced(int32_t* clock, size_t thread) const { return clock[threads + thread]; }
  int32_t& phases(int32_t* clock, size_t mbarrier) const { return clock[phases_at + mbarrier]; }
  int32_t& ended(int32_t* clock, size_t warpgroup) const { return clock[ended_at + warpgroup]; }

  void clear(Clock& clock) const { clock.assign(entries, 0); }
  // The thread's clock with its own stores up to now in it.
  int32_t* known(size_t thread) {
    int32_t* const clock = of(thread);
    stores(clock, thread) = stamps[thread];
    return clock;
  }
  void release(size_t thread, Clock& into) {
    if (entries == 0) return;
    raise_to(into.data(), known(thread), entries);
    ++stamps[thread];
  }
  void acquire(size_t thread, const Clock& from) {
    if (entries != 0) raise_to(of(thread), from.data(), entries);
  }
  // fence.proxy.async: what the thread has stored so far is there for the async proxy, for all that come after this.
  void fence(size_t thread) {
    fenced(of(thread), thread) = stamps[thread];
    ++stamps[thread];
  }
};
static Order order;

}  // namespace on_host
