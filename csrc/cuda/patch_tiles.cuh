// What the kernels of image_to_patches are told, and where their pixels come from.
#pragma once

#include <cstdint>

#include "../common/bicubic.h"
#include "../common/patch_index.h"
#include "../cpu/image_to_patches.h"

namespace qwen2vl {

constexpr int kPatchThreads = 128;
constexpr int kPatchBlocks = 8;       // on one multiprocessor: 64 registers a thread, else ptxas aims higher and spills
constexpr int kTileColumns = 112;     // 8 patches of 14
constexpr int kTileBytes = 14 * 112;  // of one plane; a patch may be 1024 wide
constexpr int kRowsAtOnce = 4;        // they share the weights of a pass along the rows
constexpr int kMostFrames = 64;       // of one launch: its parameters hold 4 KB
constexpr int kTableWords = 3 * 256;

// n / d for n and d below 2^16, without a division.
struct SmallDivider {
  uint32_t divisor, inverse;

  static SmallDivider by(int64_t d) {
    return {static_cast<uint32_t>(d), d == 1 ? 0 : static_cast<uint32_t>(((int64_t{1} << 32) + d - 1) / d)};
  }
  QWEN2VL_HD uint32_t divide(uint32_t n) const {
    return divisor == 1 ? n : static_cast<uint32_t>(static_cast<uint64_t>(n) * inverse >> 32);
  }
};

// The taps of all outputs of one axis. Weights lie tap by tap, so that neighbouring outputs read neighbouring words.
struct AxisTable {
  TapWindow* windows;  // (out)
  int32_t* weights;    // (most taps, out)
  int64_t out;
};

struct ValueTable {
  uint32_t words[kTableWords];  // (3, 256): a float32, or a bfloat16 in the low half
};

// What differs among the frames of a launch.
struct FramePlace {
  const uint8_t* pixels;
  int64_t row_stride;
  void* out;
  int64_t copies;
};

struct FramePlaces {
  FramePlace at[kMostFrames];
};

// One launch: which tiles it makes of what, and where they go.
struct Resample {
  int64_t width;                 // of the rows this makes
  int32_t in_width, channels;    // of the caller's frame
  AxisTable taps;                // of the axis that changes here
  int32_t columns, pitch, rows;  // of a tile; its rows lie `pitch` bytes apart, a multiple of 4
  SmallDivider by_words;         // pitch / 4
  int32_t column_tiles;          // next to each other
  int32_t unit, unit_tiles;      // rows that tiles do not cross, and tiles above each other in so many rows
  int32_t staged_words;          // of one input row in shared memory; 0: too many, pixels are read where they lie
  // The bytes in between: (frame, row, plane, between_pitch).
  uint8_t* between;
  int64_t between_frame, between_pitch;
  bool to_between;
  // Patches.
  PatchIndex index;
  int64_t patch_stride, channel_stride;
  PatchType type;
  const uint32_t* table;            // null for uint8
  SmallDivider by_patch, by_quads;  // quads: four values of one patch and channel, in a tile
};

// The tile of one block.
struct Tile {
  int64_t x, y, place;    // of its first pixel; the column of `x` in the bytes in between, whose tiles are padded
  int32_t columns, rows;  // of it that there are
  int32_t inside;         // row of `y` in its unit

  __device__ static Tile of(const Resample& r) {
    const uint32_t across = blockIdx.x % static_cast<uint32_t>(r.column_tiles);
    const uint32_t down = blockIdx.x / static_cast<uint32_t>(r.column_tiles);
    const uint32_t unit = down / static_cast<uint32_t>(r.unit_tiles);
    const auto inside = static_cast<int32_t>(down - unit * static_cast<uint32_t>(r.unit_tiles)) * r.rows;
    const int64_t x = static_cast<int64_t>(across) * r.columns;
    return {x,
            static_cast<int64_t>(unit) * r.unit + inside,
            static_cast<int64_t>(across) * r.pitch,
            static_cast<int32_t>(r.width - x < r.columns ? r.width - x : r.columns),
            r.unit - inside < r.rows ? r.unit - inside : r.rows,
            inside};
  }
};

// ------------------------------------------------------------------------------------------------- where pixels are

// Four pixels as the twelve bytes of three words; byte n belongs to a channel and a pixel as the source orders them.
using PixelWords = uint32_t[3];

QWEN2VL_HD inline uint32_t byte_of(const PixelWords& words, int n) { return words[n / 4] >> (8 * (n % 4)) & 255; }

// The caller's frame: channels side by side, rows anywhere.
struct Interleaved {
  const uint8_t* pixels;
  int64_t row_stride;
  int32_t width, channels;
  bool words;  // RGB whose rows start on 4-byte boundaries

  QWEN2VL_HD static Interleaved of(const Resample& r, const FramePlace& place, int64_t) {
    const bool aligned =
        (reinterpret_cast<uintptr_t>(place.pixels) | static_cast<uintptr_t>(place.row_stride)) % 4 == 0;
    return {place.pixels, place.row_stride, r.in_width, r.channels, aligned && r.channels == 3};
  }

  QWEN2VL_HD static int64_t column(const Tile& at) { return at.x; }
  QWEN2VL_HD static constexpr int channel(int n) { return n % 3; }
  QWEN2VL_HD static constexpr int pixel(int n) { return n / 3; }
  QWEN2VL_HD bool whole(int64_t x) const { return words && x % 4 == 0 && x + 4 <= width; }

  QWEN2VL_HD uint32_t rgb(int64_t y, int64_t x) const {
    const uint8_t* const at = pixels + y * row_stride + x * channels;
    if (channels == 1) return at[0] * 0x10101u;
    if (channels == 3) return at[0] | uint32_t{at[1]} << 8 | uint32_t{at[2]} << 16;
    const uint32_t alpha = at[3];
    return over_white(at[0], alpha) | uint32_t{over_white(at[1], alpha)} << 8 |
           uint32_t{over_white(at[2], alpha)} << 16;
  }

  // Pixels x..x+3, three words where `whole` says so; pixels beyond the row are 0.
  template <bool kWhole>
  QWEN2VL_HD void load(int64_t y, int64_t x, PixelWords& out) const {
    if constexpr (kWhole) {
      const auto* const at = reinterpret_cast<const uint32_t*>(pixels + y * row_stride + 3 * x);
      for (int n = 0; n < 3; ++n) out[n] = at[n];
    } else {
      uint32_t at[4];
      for (int n = 0; n < 4; ++n) at[n] = x + n < width ? rgb(y, x + n) : 0;
      out[0] = at[0] | at[1] << 24;
      out[1] = at[1] >> 8 | at[2] << 16;
      out[2] = at[2] >> 16 | at[3] << 8;
    }
  }
};

// The bytes in between: three planes a row, aligned and padded.
struct Planar {
  const uint8_t* bytes;
  int64_t pitch;

  QWEN2VL_HD static Planar of(const Resample& r, const FramePlace&, int64_t frame) {
    return {r.between + frame * r.between_frame, r.between_pitch};
  }

  QWEN2VL_HD static int64_t column(const Tile& at) { return at.place; }
  QWEN2VL_HD static constexpr int channel(int n) { return n / 4; }
  QWEN2VL_HD static constexpr int pixel(int n) { return n % 4; }
  QWEN2VL_HD bool whole(int64_t) const { return true; }

  QWEN2VL_HD uint32_t rgb(int64_t y, int64_t x) const {
    const uint8_t* const at = bytes + 3 * y * pitch + x;
    return at[0] | uint32_t{at[pitch]} << 8 | uint32_t{at[2 * pitch]} << 16;
  }

  template <bool kWhole>
  QWEN2VL_HD void load(int64_t y, int64_t x, PixelWords& out) const {
    const uint8_t* const at = bytes + 3 * y * pitch + x;
    for (int n = 0; n < 3; ++n) out[n] = *reinterpret_cast<const uint32_t*>(at + n * pitch);
  }
};

}  // namespace qwen2vl
