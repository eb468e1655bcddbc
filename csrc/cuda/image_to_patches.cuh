// Kernels of image_to_patches: weights once a size, then one launch an axis, the last of which writes the patches.
//
// Bytes: a frame of H x W pixels of C bytes becomes 3 h w values of v bytes a copy. The floor is C H W + 3 h w v
// copies, each read or written once. A frame that changes along both axes is held in between, as bytes, written once
// and read once: 3 H w of them, or 3 h W where the rows go first. Frames share launches in groups whose bytes in
// between stay in the L2 cache, so that they need not pass through device memory.
//
// A block makes a tile of some rows and columns in shared memory, three planes of bytes, and then writes it out in four
// values at a time: 4, 8 or 16 bytes. Tiles that end as patches are whole patches wide. Its arithmetic is that of
// common/bicubic.h, in integers once the weights are there: equal to the CPU's bit for bit.
#pragma once

#include <cstdint>

#include "patch_tiles.cuh"

#if defined(__CUDACC__)
#define QWEN2VL_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace qwen2vl {

// ------------------------------------------------------------------------------------------------- what tiles hold

// The bytes of four pixels from column `x` of row `row` on, into the tile's planes.
template <class Source>
__device__ inline void put_quad(const Resample& r, uint8_t* tile, int32_t row, int32_t x, const uint8_t (&bytes)[12]) {
  uint8_t* const at = tile + row * r.pitch + x;
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    uint32_t word = 0;
#pragma unroll
    for (int n = 0; n < 12; ++n) {
      if (Source::channel(n) == c) word |= uint32_t{bytes[n]} << (8 * Source::pixel(n));
    }
    *reinterpret_cast<uint32_t*>(at + c * r.rows * r.pitch) = word;
  }
}

template <class Source>
__device__ inline void cut(const Resample& r, const Source& source, const Tile& at, uint8_t* tile) {
  for (uint32_t item = threadIdx.x; item < at.rows * r.by_words.divisor; item += blockDim.x) {
    const auto row = static_cast<int32_t>(r.by_words.divide(item));
    const int32_t x = 4 * static_cast<int32_t>(item) - row * r.pitch;
    PixelWords words;
    if (source.whole(at.x + x)) {
      source.template load<true>(at.y + row, at.x + x, words);
    } else {
      source.template load<false>(at.y + row, at.x + x, words);
    }
    uint8_t bytes[12];
#pragma unroll
    for (int n = 0; n < 12; ++n) bytes[n] = static_cast<uint8_t>(byte_of(words, n));
    put_quad<Source>(r, tile, row, x, bytes);
  }
}

template <bool kWhole, class Source>
__device__ inline void sum_down(const Source& source, int64_t x, const TapWindow& window, const int32_t* weights,
                                int64_t stride, int32_t (&sums)[12]) {
#pragma unroll 4
  for (int32_t k = 0; k < window.count; ++k) {
    PixelWords words;
    source.template load<kWhole>(window.first + k, x, words);
    const int32_t weight = weights[k * stride];
#pragma unroll
    for (int n = 0; n < 12; ++n) sums[n] += weight * static_cast<int32_t>(byte_of(words, n));
  }
}

// The pass along the columns: a thread makes four pixels of a row.
template <class Source>
__device__ inline void resize_down(const Resample& r, const Source& source, const Tile& at, uint8_t* tile) {
  const int64_t column = Source::column(at);
  for (uint32_t item = threadIdx.x; item < at.rows * r.by_words.divisor; item += blockDim.x) {
    const auto row = static_cast<int32_t>(r.by_words.divide(item));
    const int32_t x = 4 * static_cast<int32_t>(item) - row * r.pitch;
    const TapWindow window = r.taps.windows[at.y + row];
    const int32_t* const weights = r.taps.weights + at.y + row;
    int32_t sums[12];
#pragma unroll
    for (int n = 0; n < 12; ++n) sums[n] = kHalfWeight;
    if (source.whole(column + x)) {
      sum_down<true>(source, column + x, window, weights, r.taps.out, sums);
    } else {
      sum_down<false>(source, column + x, window, weights, r.taps.out, sums);
    }
    uint8_t bytes[12];
#pragma unroll
    for (int n = 0; n < 12; ++n) bytes[n] = weighted_byte(sums[n]);
    put_quad<Source>(r, tile, row, x, bytes);
  }
}

// A word is left out after every 32, so that threads whose pixels lie 2, 4, ... apart read from different banks.
QWEN2VL_HD constexpr int64_t staged_place(int64_t x) { return x + x / 32; }

// Brings what rows y..y+3 need into shared memory, one word a pixel.
template <class Source>
__device__ inline void stage(const Resample& r, const Source& source, int64_t y, int32_t rows, int64_t begin,
                             int32_t pixels, uint32_t* staged) {
  constexpr int32_t kLanes = 32;
  const auto lane = static_cast<int32_t>(threadIdx.x) % kLanes;
  for (int32_t row = static_cast<int32_t>(threadIdx.x) / kLanes; row < rows; row += blockDim.x / kLanes) {
    uint32_t* const out = staged + row * r.staged_words;
    for (int32_t x = 4 * lane; x < pixels; x += 4 * kLanes) {
      PixelWords words;
      if (source.whole(begin + x)) {
        source.template load<true>(y + row, begin + x, words);
      } else {
        source.template load<false>(y + row, begin + x, words);
      }
      uint32_t rgb[4] = {0, 0, 0, 0};
#pragma unroll
      for (int n = 0; n < 12; ++n) rgb[Source::pixel(n)] |= byte_of(words, n) << (8 * Source::channel(n));
#pragma unroll
      for (int n = 0; n < 4; ++n) out[staged_place(x) + n] = rgb[n];  // x is a multiple of 4: no gap among the four
    }
  }
}

__device__ inline void add_pixel(int32_t weight, uint32_t rgb, int32_t (&sums)[3]) {
#pragma unroll
  for (int c = 0; c < 3; ++c) sums[c] += weight * static_cast<int32_t>(rgb >> (8 * c) & 255);
}

// The pass along the rows: a thread makes one column of four rows, which share its weights.
template <class Source>
__device__ inline void resize_across(const Resample& r, const Source& source, const Tile& at, uint32_t* staged,
                                     uint8_t* tile) {
  const TapWindow* const windows = r.taps.windows + at.x;
  const TapWindow last = windows[at.columns - 1];
  const int64_t begin = windows[0].first / 4 * 4;
  const auto pixels = static_cast<int32_t>(last.first + last.count - begin);
  for (int32_t top = 0; top < at.rows; top += kRowsAtOnce) {
    const int32_t rows = at.rows - top < kRowsAtOnce ? at.rows - top : kRowsAtOnce;
    if (r.staged_words != 0) {
      stage(r, source, at.y + top, rows, begin, pixels, staged);
      __syncthreads();
    }
    for (int32_t x = static_cast<int32_t>(threadIdx.x); x < r.pitch; x += blockDim.x) {
      int32_t sums[kRowsAtOnce][3];
#pragma unroll
      for (int n = 0; n < kRowsAtOnce; ++n) sums[n][0] = sums[n][1] = sums[n][2] = kHalfWeight;
      const TapWindow window = x < at.columns ? windows[x] : TapWindow{0, 0};  // padding becomes 0
      const int32_t* const weights = r.taps.weights + at.x + x;
      if (r.staged_words != 0) {
        const auto from = static_cast<int32_t>(window.first - begin);
#pragma unroll 2
        for (int32_t k = 0; k < window.count; ++k) {
          const int32_t weight = weights[k * r.taps.out];
          const uint32_t* const column = staged + staged_place(from + k);
#pragma unroll
          for (int n = 0; n < kRowsAtOnce; ++n) add_pixel(weight, column[n * r.staged_words], sums[n]);
        }
      } else {
        for (int32_t k = 0; k < window.count; ++k) {
          const int32_t weight = weights[k * r.taps.out];
#pragma unroll
          for (int n = 0; n < kRowsAtOnce; ++n) {
            if (n < rows) add_pixel(weight, source.rgb(at.y + top + n, window.first + k), sums[n]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kRowsAtOnce; ++n) {
        for (int c = 0; c < 3 && n < rows; ++c) {
          tile[(c * r.rows + top + n) * r.pitch + x] = weighted_byte(sums[n][c]);
        }
      }
    }
    __syncthreads();
  }
}

// --------------------------------------------------------------------------------------------------- what is written

__device__ inline void store_between(const Resample& r, int64_t frame, const Tile& at, const uint8_t* tile) {
  uint8_t* const out = r.between + frame * r.between_frame + at.place;
  for (uint32_t item = threadIdx.x; item < 3 * at.rows * r.by_words.divisor; item += blockDim.x) {
    const auto line = static_cast<int32_t>(r.by_words.divide(item));  // of three in a row
    const int32_t row = line / 3, c = line - 3 * row;
    const uint32_t word = item - static_cast<uint32_t>(line) * r.by_words.divisor;
    const auto* const from = reinterpret_cast<const uint32_t*>(tile + (c * r.rows + row) * r.pitch);
    reinterpret_cast<uint32_t*>(out + (3 * (at.y + row) + c) * r.between_pitch)[word] = from[word];
  }
}

template <class Value>
struct alignas(4 * sizeof(Value)) Quad {
  Value values[4];
};

// Four values of one patch and channel at a time. `places`: where each patch of the tile begins.
template <class Value>
__device__ inline void store_patches(const Resample& r, const FramePlace& frame, const Tile& at, const uint8_t* tile,
                                     const int64_t* places, const uint32_t* table) {
  const int32_t side = r.index.patch, values = at.rows * side;
  const uint32_t quads = r.by_quads.divisor;
  const uint32_t items = 3 * r.by_patch.divide(static_cast<uint32_t>(at.columns)) * quads;
  Value* const out = static_cast<Value*>(frame.out) + at.inside * side;
  for (uint32_t item = threadIdx.x; item < items; item += blockDim.x) {
    const uint32_t segment = r.by_quads.divide(item), patch = segment / 3, c = segment - 3 * patch;
    const auto first = static_cast<int32_t>(4 * (item - segment * quads));
    if (first >= values) continue;  // a tile of fewer rows than others
    const auto row = static_cast<int32_t>(r.by_patch.divide(static_cast<uint32_t>(first)));
    int32_t x = first - row * side;
    const uint8_t* from =
        tile + (static_cast<int32_t>(c) * r.rows + row) * r.pitch + static_cast<int32_t>(patch) * side;
    Quad<Value> made{};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (first + n < values) {
        if constexpr (sizeof(Value) == 1) {
          made.values[n] = from[x];
        } else {
          made.values[n] = static_cast<Value>(table[256 * c + from[x]]);
        }
      }
      if (++x == side) x = 0, from += r.pitch;
    }
    Value* to = out + places[patch] + static_cast<int64_t>(c) * r.channel_stride + first;
    for (int64_t copy = 0; copy < frame.copies; ++copy, to += side * side) {
      if (first + 4 <= values && reinterpret_cast<uintptr_t>(to) % sizeof(made) == 0) {
        *reinterpret_cast<Quad<Value>*>(to) = made;
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (first + n < values) to[n] = made.values[n];
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- kernels

// One thread an output of either axis; an axis that does not change has none.
__global__ void __launch_bounds__(kPatchThreads)
    make_weights(BicubicAxis across, AxisTable across_table, BicubicAxis down, AxisTable down_table) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool second = i >= across_table.out;
  if (second) i -= across_table.out;
  const BicubicAxis axis = second ? down : across;
  const AxisTable table = second ? down_table : across_table;
  if (i >= table.out) return;
  table.windows[i] = axis.window(i);
  axis.weights(i, table.weights + i, table.out);
}

__global__ void __launch_bounds__(kPatchThreads) place_table(const __grid_constant__ ValueTable from, uint32_t* to) {
  for (int n = static_cast<int>(threadIdx.x); n < kTableWords; n += blockDim.x) to[n] = from.words[n];
}

enum class Pass { none, across, down };

// blockIdx: tile, frame. Dynamic shared memory: what `stage` brings, then the table.
template <Pass kPass, class Source>
__global__ void __launch_bounds__(kPatchThreads, kPatchBlocks)
    resample(const __grid_constant__ Resample r, const __grid_constant__ FramePlaces frames) {
  __shared__ uint32_t tile_words[3 * kTileBytes / 4];
  __shared__ int64_t places[kTileColumns];
  QWEN2VL_DYNAMIC_SHARED(uint32_t, dynamic);
  auto* const tile = reinterpret_cast<uint8_t*>(tile_words);
  uint32_t* const table = dynamic + kRowsAtOnce * r.staged_words;

  const Tile at = Tile::of(r);
  const FramePlace& frame = frames.at[blockIdx.y];
  if (!r.to_between) {
    const int32_t side = r.index.patch;
    for (int32_t n = static_cast<int32_t>(threadIdx.x); n < at.columns / side; n += blockDim.x) {
      const auto grid_row = static_cast<int32_t>((at.y - at.inside) / side);
      places[n] = r.index.packed_row(grid_row, static_cast<int32_t>(at.x / side) + n) * r.patch_stride;
    }
    if (r.table != nullptr) {
      for (int n = static_cast<int>(threadIdx.x); n < kTableWords; n += blockDim.x) table[n] = r.table[n];
    }
  }
  const Source source = Source::of(r, frame, blockIdx.y);
  if constexpr (kPass == Pass::across) {
    resize_across(r, source, at, dynamic, tile);
  } else if constexpr (kPass == Pass::down) {
    resize_down(r, source, at, tile);
  } else {
    cut(r, source, at, tile);
  }
  __syncthreads();
  if (r.to_between) {
    store_between(r, blockIdx.y, at, tile);
  } else if (r.type == PatchType::uint8) {
    store_patches<uint8_t>(r, frame, at, tile, places, table);
  } else if (r.type == PatchType::float32) {
    store_patches<uint32_t>(r, frame, at, tile, places, table);
  } else {
    store_patches<uint16_t>(r, frame, at, tile, places, table);
  }
}

}  // namespace qwen2vl
