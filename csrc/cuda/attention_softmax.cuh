// Softmax over the keys a step at a time, on the accumulators of wgmma (FlashAttention 2, arXiv 2307.08691).
//
// A thread holds two rows of a warpgroup's 64, 8 apart, and of each row the columns 8 j + t % 4 * 2 + {0, 1}; four
// neighbouring threads share a row. Exponents are in powers of two: 2^(scale s - m).
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm90.cuh"

namespace qwen2vl {

struct Softmax {
  float m[2];  // the largest score so far, times the scale
  float l[2];  // this thread's part of the sum of the weights
};

// 2^x without the unit of special functions, which has a sixteenth of the rate of multiply-adds: x = n + f, 2^n is
// added to the exponent, 2^f on [-1/2, 1/2] a polynomial of degree 3 fitted for the least relative error (7.5e-5, a
// 50th of what rounding a weight to bfloat16 costs). No smaller than 2^-126.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 3 * 2^22: adding it leaves the nearest integer in the low bits
  x = fmaxf(x, -126.0f);
  const float n = x + kRound;
  const float f = x - (n - kRound);
  const float y = fmaf(fmaf(fmaf(0.05517167f, f, 0.24261113f), f, 0.69326099f), f, 0.99992807f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(n) << 23));
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Scores s (64, 2 Half) become weights; alpha is by how much what was summed before shrinks. Masked: of row r only the
// first seen[r] keys count. First: nothing was summed before.
template <bool First, bool Masked, int Share, int Half>
__device__ __forceinline__ void softmax_step(float (&s)[Half], Softmax& state, float (&alpha)[2], float scale,
                                             const int (&seen)[2]) {
  if constexpr (Masked) {
    const int own = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < Half; ++i) {
      if (i / 4 * 8 + i % 2 >= seen[i / 2 % 2] - own) s[i] = -INFINITY;
    }
  }
  float most[2] = {s[0], s[2]};
#pragma unroll
  for (int i = 0; i < Half; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float m = quad_max(most[r]) * scale;
    if constexpr (!First) m = fmaxf(m, state.m[r]);
    // A row that has seen no key yet: minus infinity less minus infinity is no number.
    most[r] = Masked && m == -INFINITY ? 0.0f : m;
    if constexpr (!First) alpha[r] = sm90::exp2_approx(state.m[r] - most[r]);
    state.m[r] = m;
  }
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < Half; ++i) {
    const float x = fmaf(s[i], scale, -most[i / 2 % 2]);
    // Not where scores are masked: the polynomial's least is not zero.
    s[i] = !Masked && i / 4 % 8 < Share ? exp2_polynomial(x) : sm90::exp2_approx(x);
    sum[i / 2 % 2] += s[i];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) state.l[r] = First ? sum[r] : fmaf(state.l[r], alpha[r], sum[r]);
}

}  // namespace qwen2vl
