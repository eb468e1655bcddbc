// Attention inside the segments of a packed sequence on Hopper, forward: o = softmax(scale q k^T) v.
//
// A block stays on its multiprocessor and takes one tile of queries after the other. Its first warpgroup loads: one
// warp decides what is next and has TMA bring q, k and v. The others multiply, 64 queries each, in the order of
// FlashAttention 3 (arXiv 2407.08608): q k^T of the next keys and p v of the last ones run while the exponentials of
// these are made, and the consumers take turns at the tensor cores. Every head is multiplied at its own width, in
// blocks of 16, 32 or 64 columns. Keys are taken from the segment's end to its begin, so that the one step that may
// need a mask (without causality) comes first.
//
// A tile's sums have one order, whatever else is in the pack and however many blocks there are.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention_producer.cuh"
#include "attention_shape.h"
#include "attention_softmax.cuh"
#include "cuda/sm90.cuh"

#ifndef QWEN2VL_DYNAMIC_SHARED
#define QWEN2VL_DYNAMIC_SHARED(type, name) extern __shared__ __align__(1024) type name[]
#endif

namespace qwen2vl {

using sm90::Element;
using sm90::Major;

// Operands of a step. Of q and k it takes 16 columns, and the leading offset is not read, as rows are swizzled; of v it
// takes 16 keys.
template <int RowBytes>
__device__ __forceinline__ uint64_t depth_operand(const AttentionShape& shape, uint32_t tile, int rows, int step) {
  return sm90::matrix_descriptor<RowBytes>(tile + shape.depth_at(rows, step), 16, shape.group_bytes());
}

template <int RowBytes>
__device__ __forceinline__ uint64_t across_operand(const AttentionShape& shape, uint32_t tile, int rows, int step) {
  return sm90::matrix_descriptor<RowBytes>(tile + shape.across_at(step), shape.block_bytes(rows), shape.group_bytes());
}

// s (64, keys) = q k^T, a step of 16 columns at a time.
template <class Config, Element E>
__device__ __forceinline__ void issue_scores(float (&s)[Config::kShape.keys / 2], uint32_t q, uint32_t k) {
  constexpr AttentionShape shape = Config::kShape;
#pragma unroll
  for (int step = 0; step < shape.depth(); ++step) {
    const uint64_t a = depth_operand<shape.row_bytes()>(shape, q, shape.rows(), step);
    const uint64_t b = depth_operand<shape.row_bytes()>(shape, k, shape.keys, step);
    if (step == 0) {
      sm90::wgmma<E, Major::kDepth, false>(s, a, b);
    } else {
      sm90::wgmma<E, Major::kDepth, true>(s, a, b);
    }
  }
  sm90::wgmma_commit_group();
}

// o (64, across) += p v, a step of 16 keys at a time.
template <class Config, Element E>
__device__ __forceinline__ void issue_values(float (&o)[Config::kShape.across / 2],
                                             uint32_t (&p)[Config::kShape.keys / 4], uint32_t p_shared, uint32_t v) {
  constexpr AttentionShape shape = Config::kShape;
#pragma unroll
  for (int step = 0; step < shape.keys / 16; ++step) {
    const uint64_t b = across_operand<shape.row_bytes()>(shape, v, shape.keys, step);
    if constexpr (shape.p_shared) {
      sm90::wgmma<E, Major::kAcross, true>(o, sm90::matrix_descriptor<32>(p_shared + step * 64 * 32, 16, 256), b);
    } else {
      sm90::wgmma<E, Major::kAcross, true>(o, p + 4 * step, b);
    }
  }
  sm90::wgmma_commit_group();
}

// Weights as wgmma takes them for its first operand: in these registers, whose order is that of the accumulators, or
// in shared memory, in blocks of 16 keys.
template <Element E, bool PShared, int Half>
__device__ __forceinline__ void keep_weights(uint32_t (&p)[Half / 2], const float (&s)[Half], uint32_t p_shared,
                                             uint32_t barrier) {
#pragma unroll
  for (int i = 0; i < Half / 2; ++i) p[i] = sm90::pack<E>(s[2 * i], s[2 * i + 1]);
  if constexpr (PShared) {
    const uint32_t lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const uint32_t at = p_shared + row * 32 + (lane / 16 ^ row / 4 % 2) * 16;
#pragma unroll
    for (int step = 0; step < Half / 8; ++step) sm90::stmatrix<4>(at + step * 64 * 32, p + 4 * step);
    sm90::fence_proxy_async();
    sm90::named_barrier_sync(barrier, 128);
  }
}

template <int Count>
__device__ __forceinline__ void rescale(float (&o)[Count], const float (&alpha)[2]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) o[i] *= alpha[i / 2 % 2];
}

// A warp's 16 rows of results, divided by their sums, and the logs of these; rows behind the segment are not there.
template <int Head, Element E, int Count>
__device__ __forceinline__ void store_results(const float (&o)[Count], const Softmax& state, const AttentionTile& tile,
                                              const AttentionWork& work, int row, uint32_t staging, int pitch) {
  const int lane = threadIdx.x % 32;
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(state.l[r]);
    inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;  // a row that sees no key has zeros
    const int own = row + lane / 4 + 8 * r;
    if (work.lse != nullptr && lane % 4 == 0 && own < tile.own_end) {
      work.lse[tile.head * work.rows + own] = state.m[r] + log2f(sum);
    }
  }
  // What a warp stored of the last tile it has read: all its lanes have met since, where q was released.
  const uint32_t at = staging + (lane % 16) * pitch + lane / 16 * 16;
#pragma unroll
  for (int group = 0; group < Head / 8; group += 2) {
    uint32_t fragments[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = 4 * group + 2 * i;
      if (from < Head / 2) fragments[i] = sm90::pack<E>(o[from] * inverse[i % 2], o[from + 1] * inverse[i % 2]);
    }
    if (group + 1 < Head / 8) {
      sm90::stmatrix<4>(at + 16 * group, fragments);
    } else {
      sm90::stmatrix<2>(at + 16 * group, fragments);
    }
  }
  __syncwarp();
  constexpr int kChunks = Head / 8;
#pragma unroll
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int own = i / kChunks, chunk = i % kChunks;
    if (row + own < tile.own_end) {
      uint16_t* to = work.out + (static_cast<int64_t>(row + own) * work.heads + tile.head) * Head + 8 * chunk;
      *reinterpret_cast<uint4*>(to) = sm90::load_shared(staging + own * pitch + 16 * chunk);
    }
  }
}

// A warpgroup: 64 of the tile's queries.
template <class Config, Element E, bool Causal>
__device__ __forceinline__ void consume(const AttentionWork& work, uint32_t shared, int consumer) {
  constexpr AttentionShape shape = Config::kShape;
  constexpr int kKeys = shape.keys, kConsumers = shape.consumers;
  const AttentionBarriers<Config> barriers{shared + shape.barriers_at()};
  const uint32_t q = shared + shape.q_at() + consumer * 64 * shape.row_bytes();
  const uint32_t p_shared = shared + shape.p_at() + consumer * shape.p_bytes();
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const bool leads = threadIdx.x % 128 == 0;

  // Turns at the tensor cores: barriers 1 to 3 of this consumer and the one before; 4 to 6 are a consumer's own.
  const auto take_turn = [&] {
    if constexpr (kConsumers > 1) sm90::named_barrier_sync(1 + consumer, 256);
  };
  const auto pass_turn = [&] {
    if constexpr (kConsumers > 1) sm90::named_barrier_arrive(1 + (consumer + 1) % kConsumers, 256);
  };
  if (consumer == kConsumers - 1) pass_turn();  // the first one need not wait for it at first

  Ring<shape.stages()> k_ring, v_ring;
  uint32_t q_parity = 0;
  float s[kKeys / 2], o[shape.across / 2], alpha[2];
  uint32_t p[kKeys / 4];
  while (true) {
    sm90::mbarrier_wait(barriers.q_full(), q_parity);
    q_parity ^= 1;
    const AttentionTile tile = AttentionTile::load(shared + shape.tile_at());
    if (tile.steps < 0) break;
    const int row = consumer * 64 + warp * 16;  // of this warp, in the tile
    Softmax state{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
#pragma unroll
    for (int i = 0; i < shape.across / 2; ++i) o[i] = 0.0f;
    // Keys from this step's first on that a row sees.
    const auto seen_at = [&](int step, int (&seen)[2]) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        seen[r] = tile.keys - step * kKeys;
        if constexpr (Causal) seen[r] = min(seen[r], tile.diagonal + row + lane / 4 + 8 * r + 1 - step * kKeys);
      }
    };
    const auto release_q = [&] {
      __syncwarp();
      if (lane == 0) sm90::mbarrier_arrive(barriers.q_empty());
    };

    if (tile.steps > 0) {
      int step = tile.steps - 1, seen[2];
      sm90::mbarrier_wait(barriers.k_full(k_ring.stage), k_ring.parity);
      take_turn();
      sm90::wgmma_fence(s);
      issue_scores<Config, E>(s, q, shared + shape.k_at() + k_ring.stage * shape.key_bytes());
      pass_turn();
      sm90::wgmma_wait_group<0>(s);
      if (leads) sm90::mbarrier_arrive(barriers.k_empty(k_ring.stage));
      k_ring.advance();
      seen_at(step, seen);
      softmax_step<true, true, 0>(s, state, alpha, work.scale, seen);
      keep_weights<E, shape.p_shared>(p, s, p_shared, 4 + consumer);
      if (step > 0) sm90::mbarrier_wait(barriers.k_full(k_ring.stage), k_ring.parity);

      // The scores of these keys, the weighted sum of the values of the keys before, and the weights of these.
      const auto advance = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        --step;
        take_turn();
        sm90::wgmma_fence(s);
        issue_scores<Config, E>(s, q, shared + shape.k_at() + k_ring.stage * shape.key_bytes());
        sm90::mbarrier_wait(barriers.v_full(v_ring.stage), v_ring.parity);
        sm90::wgmma_fence(o, p);
        issue_values<Config, E>(o, p, p_shared, shared + shape.v_at() + v_ring.stage * shape.key_bytes());
        pass_turn();
        sm90::wgmma_wait_group<1>(s);
        if (leads) sm90::mbarrier_arrive(barriers.k_empty(k_ring.stage));
        k_ring.advance();
        if constexpr (kMasked) seen_at(step, seen);
        softmax_step<false, kMasked, shape.share>(s, state, alpha, work.scale, seen);
        // ptxas moves the wait for p v above the exponentials, where nothing runs beside them, unless this lies
        // between.
        if (step > 0) sm90::mbarrier_wait(barriers.k_full(k_ring.stage), k_ring.parity);
        sm90::wgmma_wait_group<0>(o, p);
        if (leads) sm90::mbarrier_arrive(barriers.v_empty(v_ring.stage));
        v_ring.advance();
        rescale(o, alpha);
        keep_weights<E, shape.p_shared>(p, s, p_shared, 4 + consumer);
      };
      if constexpr (Causal) {
        // Steps before this one are seen whole by all of this warpgroup's rows.
        const int whole = max(0, tile.diagonal + consumer * 64 + 1) / kKeys;
#pragma unroll 1
        while (step > whole) advance(std::true_type{});
      }
#pragma unroll 1
      while (step > 0) advance(std::false_type{});

      release_q();
      sm90::mbarrier_wait(barriers.v_full(v_ring.stage), v_ring.parity);
      sm90::wgmma_fence(o, p);
      issue_values<Config, E>(o, p, p_shared, shared + shape.v_at() + v_ring.stage * shape.key_bytes());
      sm90::wgmma_wait_group<0>(o, p);
      if (leads) sm90::mbarrier_arrive(barriers.v_empty(v_ring.stage));
      v_ring.advance();
    } else {
      release_q();
    }
    store_results<shape.head, E>(o, state, tile, work, tile.row + row,
                                 shared + shape.out_at() + (4 * consumer + warp) * shape.out_bytes(),
                                 shape.out_pitch());
  }
}

// The kernel's body. Each kernel has 2 or 3 consumers and one producer warpgroup, and all of a multiprocessor.
template <class Config, Element E, bool Causal>
__device__ __forceinline__ void attend(const TensorMap* q, const TensorMap* k, const TensorMap* v,
                                       const AttentionWork& work) {
  constexpr AttentionShape shape = Config::kShape;
  QWEN2VL_DYNAMIC_SHARED(uint8_t, dynamic);
  const uint32_t shared = sm90::shared_address(dynamic);
  if (threadIdx.x == 0) AttentionBarriers<Config>{shared + shape.barriers_at()}.init();
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);  // the same in a warp, says that
  if (warpgroup == 0) {
    sm90::setmaxnreg_dec<shape.producer_registers()>();
    if (threadIdx.x < 32) produce<Config, Causal>(q, k, v, work, shared);
  } else {
    sm90::setmaxnreg_inc<shape.consumer_registers()>();
    consume<Config, E, Causal>(work, shared, warpgroup - 1);
  }
}

template <class Config, Element E, bool Causal>
__global__ void __launch_bounds__(Config::kShape.threads(), 1)
    attention_forward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                      const __grid_constant__ TensorMap v, const __grid_constant__ AttentionWork work) {
  attend<Config, E, Causal>(&q, &k, &v, work);
}

}  // namespace qwen2vl
