// Runs CUDA kernels on the CPU, one block at a time, so that their logic is tested where there is no GPU.
//
// The threads of a block are fibers that take turns. A barrier hands the turn on; as every thread of a block passes the
// same barriers, one round of turns is one barrier. Warp shuffles become an exchange between two barriers.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define QWEN2VL_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(on_host::dynamic_shared.get())

struct Index {
  unsigned x, y;
};
static Index threadIdx, blockIdx, blockDim;

namespace on_host {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::vector<int64_t> exchange;
static const std::function<void()>* body;
static std::unique_ptr<char[]> dynamic_shared;

inline void barrier() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

inline void enter() {
  (*body)();
  fibers[threadIdx.x].done = true;
}

inline void run_block(unsigned block, unsigned threads, const std::function<void()>& kernel) {
  body = &kernel;
  blockIdx.x = block;
  blockDim.x = threads;
  exchange.assign(threads, 0);
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    fiber.stack.resize(256 * 1024);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned finished = 0; finished < threads;) {
    finished = 0;
    for (unsigned thread = 0; thread < threads; ++thread) {
      threadIdx.x = thread;
      if (!fibers[thread].done) swapcontext(&scheduler, &fibers[thread].context);
      finished += fibers[thread].done;
    }
    if (finished != 0 && finished != threads) {
      std::fputs("threads of one block passed different numbers of barriers\n", stderr);
      std::exit(2);
    }
  }
}

// Blocks (x, y) one after the other, each with `shared_bytes` of dynamic shared memory and not a byte more.
inline void run_grid(unsigned blocks, unsigned rows, unsigned threads, size_t shared_bytes,
                     const std::function<void()>& kernel) {
  for (blockIdx.y = 0; blockIdx.y < rows; ++blockIdx.y) {
    for (unsigned block = 0; block < blocks; ++block) {
      dynamic_shared.reset(new char[shared_bytes]);
      run_block(block, threads, kernel);
    }
  }
  blockIdx.y = 0;
}

}  // namespace on_host

inline void __syncthreads() { on_host::barrier(); }

inline int64_t __shfl_up_sync(unsigned, int64_t value, int distance) {
  on_host::exchange[threadIdx.x] = value;
  on_host::barrier();
  const bool inside = static_cast<int>(threadIdx.x % 32) >= distance;
  const int64_t got = inside ? on_host::exchange[threadIdx.x - distance] : value;
  on_host::barrier();
  return got;
}
