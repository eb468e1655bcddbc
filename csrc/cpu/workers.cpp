#include "workers.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace qwen2vl {
namespace {

// Looks at whether the others are done before this thread sleeps: some 20 us.
constexpr int kLooks = 500;

inline void pause() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#endif
}

// Threads beyond so many begin where another one does.
constexpr int64_t kRanges = 64;

// Each in a cache line of its own, as the threads count in their own.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

class Workers {
 public:
  void run(int64_t threads, int64_t pieces, const std::function<void(int64_t)>& work) {
    threads = std::min(threads, pieces);
    const std::unique_lock<std::mutex> only(calls_, std::try_to_lock);
    if (threads <= 1 || !only.owns_lock()) {
      for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      work_ = &work;
      seats_ = std::min(threads - 1, made_);
      ranges_ = std::min<int64_t>(seats_ + 1, kRanges);
      for (int64_t n = 0; n < ranges_; ++n) {
        range_[static_cast<size_t>(n)].next = pieces * n / ranges_;
        range_[static_cast<size_t>(n)].end = pieces * (n + 1) / ranges_;
      }
    }
    for (int64_t n = 1; n < threads; ++n) wake_.notify_one();
    take(0);
    // Who has not woken by now finds no seat; who has is waited for, a piece's time awake, which is shorter than
    // falling asleep and being woken takes.
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;
    lock.unlock();
    for (int look = 0; look < kLooks && busy_ != 0; ++look) pause();
    lock.lock();
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void grow(int64_t wanted) {
    try {
      for (; made_ < wanted; ++made_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that run share the work.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      const int64_t seat = seats_--;
      ++busy_;
      lock.unlock();
      take(seat);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  // Neighbouring pieces, so that what a piece has asked memory for beyond its end is wanted by this thread; then what
  // others have not come to.
  // Who runs out of memory inside of a piece ends the process: others may have begun, and cannot be taken back.
  void take(int64_t seat) noexcept {
    for (int64_t n = 0; n < ranges_; ++n) {
      Range& range = range_[static_cast<size_t>((seat + n) % ranges_)];
      for (int64_t piece = range.next++; piece < range.end; piece = range.next++) (*work_)(piece);
    }
  }

  std::mutex calls_;  // held by the call that the threads work for
  std::mutex mutex_;  // of all that follows
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* work_ = nullptr;
  std::array<Range, kRanges> range_;
  std::atomic<int64_t> busy_{0};
  int64_t ranges_ = 0, seats_ = 0, made_ = 0;
};

// Never destroyed: the threads may wait in it when the process ends.
Workers* workers = nullptr;
std::once_flag begun;

void begin_anew() { workers = new Workers; }

}  // namespace

void run_pieces(int64_t threads, int64_t pieces, const std::function<void(int64_t)>& work) {
  std::call_once(begun, [] {
    begin_anew();
    pthread_atfork(nullptr, nullptr, begin_anew);  // what another thread held in the parent stays held in the child
  });
  workers->run(threads, pieces, work);
}

}  // namespace qwen2vl
