// Kernels of the M-RoPE position builder: one block scans, then every token is placed on its own.
#pragma once

#include <cstdint>

#include "../common/mrope.h"
#include "block_scan.cuh"

namespace qwen2vl {

constexpr int kScanThreads = 1024;
constexpr int kTokensPerThread = 4;
constexpr int kFillThreads = 256;

// Where the scan leaves its sums for the fill; all of it lies in one workspace.
struct MropeWorkspace {
  int64_t* image_ends;
  int64_t* image_shifts;
  int64_t* video_ends;
  int64_t* video_shifts;
  int64_t* bases;
  Counts* counts;

  static int64_t bytes(int64_t tokens, int64_t images, int64_t videos, int64_t sequences) {
    const int64_t sums = 2 * (images + videos + sequences) + 2;
    return sums * static_cast<int64_t>(sizeof(int64_t)) + (tokens + 1) * static_cast<int64_t>(sizeof(Counts));
  }

  static MropeWorkspace at(int64_t* memory, int64_t images, int64_t videos, int64_t sequences) {
    MropeWorkspace out{};
    out.image_ends = memory;
    out.image_shifts = out.image_ends + images;
    out.video_ends = out.image_shifts + images + 1;
    out.video_shifts = out.video_ends + videos;
    out.bases = out.video_shifts + videos + 1;
    out.counts = reinterpret_cast<Counts*>(out.bases + 2 * sequences);
    return out;
  }

  QWEN2VL_HD MropeSums sums(const MropeInput& in) const {
    return {counts,
            {image_ends, image_shifts, in.images},
            {video_ends, video_shifts, in.videos},
            in.state.given() ? bases : nullptr};
  }
};

__device__ inline void scan_items(const IntView& grids, int64_t items, int64_t merge_size, int64_t* ends,
                                  int64_t* shifts, int64_t* warp_sums) {
  int64_t tokens_before = 0, shift_before = 0;
  for (int64_t base = 0; base < items; base += blockDim.x) {
    const int64_t item = base + threadIdx.x;
    const Extent e = item < items ? extent(grids, item, merge_size) : Extent{0, 0, 0};
    int64_t tokens = 0, shift = 0;
    const int64_t tokens_here = tokens_before + block_exclusive_scan(e.tokens(), warp_sums, &tokens);
    const int64_t shift_here = shift_before + block_exclusive_scan(e.shift(), warp_sums, &shift);
    if (item < items) {
      ends[item] = tokens_here + e.tokens();
      shifts[item] = shift_here;
    }
    tokens_before += tokens;
    shift_before += shift;
  }
  if (threadIdx.x == 0) shifts[items] = shift_before;
}

// Three counts in one word: a step of the scan sees 1024 * 4 tokens at most, so 21 bits each cannot overflow.
__device__ inline int64_t pack_counts(int64_t kept, int64_t image, int64_t video) {
  return kept | image << 21 | video << 42;
}

__device__ inline Counts add_packed(const Counts& counts, int64_t packed) {
  constexpr int64_t low = (int64_t{1} << 21) - 1;
  return {counts.kept + static_cast<int32_t>(packed & low), counts.image + static_cast<int32_t>(packed >> 21 & low),
          counts.video + static_cast<int32_t>(packed >> 42)};
}

// One block walks the flattened batch, 4096 tokens a step.
__global__ void __launch_bounds__(kScanThreads) mrope_scan(MropeInput in, MropeWorkspace out) {
  __shared__ int64_t warp_sums[kScanThreads / kWarp];
  scan_items(in.image_grids, in.images, in.merge_size, out.image_ends, out.image_shifts, warp_sums);
  scan_items(in.video_grids, in.videos, in.merge_size, out.video_ends, out.video_shifts, warp_sums);

  const int64_t tokens = in.tokens();
  const int64_t step = static_cast<int64_t>(blockDim.x) * kTokensPerThread;
  Counts before{0, 0, 0};  // the step, the same in every thread
  for (int64_t base = 0; base < tokens; base += step) {
    const int64_t first = base + static_cast<int64_t>(threadIdx.x) * kTokensPerThread;
    int64_t own[kTokensPerThread];
    int64_t sum = 0;
#pragma unroll
    for (int n = 0; n < kTokensPerThread; ++n) {
      const int64_t token = first + n;
      const bool kept = token < tokens && in.kept(token);
      const int64_t id = kept ? in.id(token) : 0;
      own[n] = pack_counts(kept, kept && id == in.image_token, kept && id == in.video_token);
      sum += own[n];
    }
    int64_t all = 0;
    int64_t left = block_exclusive_scan(sum, warp_sums, &all);
#pragma unroll
    for (int n = 0; n < kTokensPerThread; ++n) {
      if (first + n < tokens) out.counts[first + n] = add_packed(before, left);
      left += own[n];
    }
    before = add_packed(before, all);
  }
  if (threadIdx.x == 0) out.counts[tokens] = before;
  if (!in.state.given()) return;
  // A sequence's first item follows from where the one before it was cut: a walk, one thread a modality.
  __syncthreads();
  if (threadIdx.x < 2) place_items(in, out.sums(in), static_cast<int>(threadIdx.x), out.bases);
}

// One thread a token; the first `sequences` threads also write the deltas and, unless it is null, the state.
__global__ void __launch_bounds__(kFillThreads)
    mrope_fill(MropeInput in, MropeWorkspace workspace, int64_t* positions, int64_t* delta, int64_t* state) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t tokens = in.tokens();
  const MropeSums sums = workspace.sums(in);
  if (index < tokens) {
    const Position at = token_position(in, sums, index);
    positions[index] = at.t;
    positions[tokens + index] = at.h;
    positions[2 * tokens + index] = at.w;
  }
  if (index < in.sequences) {
    const MropeState after = state_after(in, sums, index);
    delta[index] = after.delta();
    if (state != nullptr) after.store(state + kStateSize * index);
  }
}

}  // namespace qwen2vl
