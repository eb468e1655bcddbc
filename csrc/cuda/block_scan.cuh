// Exclusive prefix sum over the threads of one block.
#pragma once

#include <cstdint>

namespace qwen2vl {

constexpr int kWarp = 32;

// Every thread of the block must call this. `warp_sums` is shared memory for one value per warp, of which there are at
// most 32; `total` comes back as the sum over all threads. Integer sums: the order of additions does not matter.
__device__ inline int64_t block_exclusive_scan(int64_t value, int64_t* warp_sums, int64_t* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;

  int64_t inclusive = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t left = __shfl_up_sync(0xffffffffu, inclusive, distance);
    if (lane >= distance) inclusive += left;
  }
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();

  int64_t before = 0, all = 0;
  for (int other = 0; other < warps; ++other) {
    const int64_t sum = warp_sums[other];
    if (other < warp) before += sum;
    all += sum;
  }
  *total = all;
  __syncthreads();  // the next call overwrites warp_sums
  return before + inclusive - value;
}

}  // namespace qwen2vl
