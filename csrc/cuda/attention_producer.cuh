// What the warps of an attention block tell each other, and the one that loads: which tile is next, and its q, k and v.
#pragma once

#include <climits>
#include <cstdint>

#include "attention_shape.h"
#include "cuda/sm90.cuh"

namespace qwen2vl {

using sm90::TensorMap;

// The barriers of a block. Full: what was asked for is in shared memory. Empty: nobody reads it any more.
template <class Config>
struct AttentionBarriers {
  static constexpr int kStages = Config::kShape.stages(), kConsumers = Config::kShape.consumers;
  uint32_t base;  // their address in shared memory

  __device__ uint32_t q_full() const { return base; }
  __device__ uint32_t q_empty() const { return base + 8; }
  __device__ uint32_t tail_full() const { return base + 16; }
  __device__ uint32_t k_full(int stage) const { return base + 24 + 8 * stage; }
  __device__ uint32_t k_empty(int stage) const { return k_full(stage) + 8 * kStages; }
  __device__ uint32_t v_full(int stage) const { return k_full(stage) + 16 * kStages; }
  __device__ uint32_t v_empty(int stage) const { return k_full(stage) + 24 * kStages; }

  __device__ void init() const {
    sm90::mbarrier_init(q_full(), 1);
    sm90::mbarrier_init(q_empty(), 4 * kConsumers);
    sm90::mbarrier_init(tail_full(), 1);
    for (int stage = 0; stage < kStages; ++stage) {
      sm90::mbarrier_init(k_full(stage), 1);
      sm90::mbarrier_init(k_empty(stage), kConsumers);
      sm90::mbarrier_init(v_full(stage), 1);
      sm90::mbarrier_init(v_empty(stage), kConsumers);
    }
    sm90::fence_mbarrier_init();
  }
};

// Where a ring of stages is, and the parity of the phase that is waited for there.
template <int Stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What the producer tells the consumers of a tile: 32 bytes in shared memory.
struct AttentionTile {
  int row;       // its first query
  int own_end;   // end of the queries' segment
  int head;      // of the queries
  int steps;     // of kKeys keys that it takes; negative: there are no more tiles
  int keys;      // of its segment
  int diagonal;  // the last key that the first query sees, counted from the segment's begin

  __device__ void store(uint32_t address) const {
    sm90::store_shared(address, {static_cast<uint32_t>(row), static_cast<uint32_t>(own_end),
                                 static_cast<uint32_t>(head), static_cast<uint32_t>(steps)});
    sm90::store_shared(address + 16, {static_cast<uint32_t>(keys), static_cast<uint32_t>(diagonal), 0, 0});
  }

  __device__ static AttentionTile load(uint32_t address) {
    const uint4 a = sm90::load_shared(address), b = sm90::load_shared(address + 16);
    return {static_cast<int>(a.x), static_cast<int>(a.y), static_cast<int>(a.z),
            static_cast<int>(a.w), static_cast<int>(b.x), static_cast<int>(b.y)};
  }
};

// ------------------------------------------------------------------------------------------------------------ producer

// How many tiles from the list's front on `holds` is true of; it is true of a prefix. All lanes of a warp look.
template <class Holds>
__device__ int count_prefix(int count, Holds holds) {
  int low = 0, high = count;
  while (low < high) {
    const int step = (high - low + 31) / 32, at = low + static_cast<int>(threadIdx.x % 32) * step;
    const int held = __popc(__ballot_sync(~0u, at < high && holds(at)));
    high = min(high, low + held * step);
    if (held > 0) low += (held - 1) * step + 1;
  }
  return low;
}

// Columns of a tile that lie in one block of shared memory arrive by one box, those of all blocks by one copy where the
// map has a dimension for them. A head that ends inside a block has none: its last box leaves the tensor there, and
// reads zeros where the next head begins.
template <class Config, int Rows>
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap* map, uint32_t barrier, int row, int head) {
  constexpr AttentionShape shape = Config::kShape;
  if constexpr (shape.head == shape.width()) {
    sm90::tma_load(to, map, barrier, 0, row, 0, head);
  } else {
    for (int block = 0; block < shape.blocks(); ++block) {
      sm90::tma_load(to + block * shape.block_bytes(Rows), map, barrier, block * shape.columns, row, head);
    }
  }
}

// Rows of a tile of v that lie behind their segment belong to the next one. Their weights are zero, but zero times
// infinity is no number.
template <class Config>
__device__ __forceinline__ void zero_rows_from(uint32_t tile, int first) {
  constexpr AttentionShape shape = Config::kShape;
  const int chunks = (shape.keys - first) * shape.row_bytes() / 16;
  for (int block = 0; block < shape.blocks(); ++block) {
    const uint32_t from = tile + block * shape.block_bytes(shape.keys) + first * shape.row_bytes();
    for (int chunk = threadIdx.x % 32; chunk < chunks; chunk += 32) sm90::store_shared(from + 16 * chunk, {0, 0, 0, 0});
  }
  sm90::fence_proxy_async();
  __syncwarp();
}

// One warp. It asks for what comes next as soon as there is room for it, while the consumers work on the tile before.
template <class Config, bool Causal>
__device__ __forceinline__ void produce(const TensorMap* q, const TensorMap* k, const TensorMap* v,
                                        const AttentionWork& work, uint32_t shared) {
  constexpr AttentionShape shape = Config::kShape;
  constexpr int kRows = shape.rows(), kKeys = shape.keys;
  const AttentionBarriers<Config> barriers{shared + shape.barriers_at()};
  const bool leads = threadIdx.x % 32 == 0;
  if (leads) {
    for (const TensorMap* map : {q, k, v}) sm90::prefetch_tensormap(map);
  }

  const auto keys_of = [&](int tile) {
    const int32_t* at = work.tiles + static_cast<int64_t>(tile) * work.width;
    return at[2] - at[1];
  };
  const auto own_end_of = [&](int tile) {
    return work.tiles[static_cast<int64_t>(tile) * work.width + work.width - 1];
  };
  int first = 0;
  if (work.most != INT_MAX) first = count_prefix(work.count, [&](int i) { return keys_of(i) > work.most; });
  const int stop = count_prefix(work.count, [&](int i) { return own_end_of(i) > 0 && keys_of(i) > work.least; });
  const int tiles = max(stop - first, 0), items = tiles * work.heads, grid = gridDim.x;

  Ring<shape.stages()> ring;
  uint32_t q_parity = 0, tail_parity = 0;
  bool forth = true;  // tiles of a list that is sorted by their work go to blocks forth and back
  for (int round = 0; round < items; round += grid, forth = !forth) {
    const int item = round + (forth ? static_cast<int>(blockIdx.x) : grid - 1 - static_cast<int>(blockIdx.x));
    if (item >= items) continue;
    const int head = item / tiles, tile = first + item % tiles;
    const int32_t* at = work.tiles + static_cast<int64_t>(tile) * work.width;
    const int row = at[0], begin = at[1], end = at[2], own_end = own_end_of(tile);
    const int past = end - own_end;  // a causal mask ends where both segments end
    const int stop_key = Causal ? min(end, min(row + kRows, own_end) + past) : end;
    const int steps = stop_key > begin ? (stop_key - begin + kKeys - 1) / kKeys : 0;

    sm90::mbarrier_wait(barriers.q_empty(), q_parity ^ 1);
    q_parity ^= 1;
    if (leads) {
      AttentionTile{row, own_end, head, steps, end - begin, row + past - begin}.store(shared + shape.tile_at());
      sm90::mbarrier_arrive_expect_tx(barriers.q_full(), shape.q_bytes());
      load_tile<Config, kRows>(shared + shape.q_at(), q, barriers.q_full(), row, head);
    }
    // The rows behind the segment are zeroed when the next step's keys are on their way.
    int tail_rows = min(end - (begin + (steps - 1) * kKeys), kKeys), tail_stage = -1;
    const auto end_tail = [&] {
      if (tail_stage < 0) return;
      sm90::mbarrier_wait(barriers.tail_full(), tail_parity);
      tail_parity ^= 1;
      zero_rows_from<Config>(shared + shape.v_at() + tail_stage * shape.key_bytes(), tail_rows);
      if (leads) sm90::mbarrier_arrive(barriers.v_full(tail_stage));
      tail_stage = -1;
    };
    for (int step = steps - 1; step >= 0; --step) {
      const int key = begin + step * kKeys;
      sm90::mbarrier_wait(barriers.k_empty(ring.stage), ring.parity ^ 1);
      if (leads) {
        sm90::mbarrier_arrive_expect_tx(barriers.k_full(ring.stage), shape.key_bytes());
        load_tile<Config, kKeys>(shared + shape.k_at() + ring.stage * shape.key_bytes(), k, barriers.k_full(ring.stage),
                                 key, head / work.group);
      }
      end_tail();
      if (step == steps - 1 && tail_rows < kKeys) tail_stage = ring.stage;
      const uint32_t full = tail_stage < 0 ? barriers.v_full(ring.stage) : barriers.tail_full();
      sm90::mbarrier_wait(barriers.v_empty(ring.stage), ring.parity ^ 1);
      if (leads) {
        sm90::mbarrier_arrive_expect_tx(full, shape.key_bytes());
        load_tile<Config, kKeys>(shared + shape.v_at() + ring.stage * shape.key_bytes(), v, full, key,
                                 head / work.group);
      }
      ring.advance();
    }
    end_tail();
  }
  sm90::mbarrier_wait(barriers.q_empty(), q_parity ^ 1);
  if (leads) {
    AttentionTile{0, 0, 0, -1, 0, 0}.store(shared + shape.tile_at());
    sm90::mbarrier_arrive(barriers.q_full());
  }
}

}  // namespace qwen2vl
