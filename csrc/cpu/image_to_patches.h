#pragma once

#include <cstdint>
#include <vector>

namespace qwen2vl {

// One frame: where its pixels are, its size as patches, where the patches go. Strides of the output count values.
struct FrameJob {
  const uint8_t* pixels;
  int64_t height, width, channels;  // 1 grey, 3 RGB, 4 RGBA (laid over white)
  int64_t row_stride;               // bytes, any sign
  int64_t out_height, out_width;    // multiples of patch * merge
  void* out;
  int64_t patch_stride, channel_stride;
  int64_t copies;  // time slots to fill, patch * patch values apart: a still image stands in both
};

enum class PatchType : int64_t { uint8 = 0, float32 = 1, bfloat16 = 2 };

struct PatchOptions {
  int64_t patch, merge;
  PatchType type;
  const void* table;  // (3, 256) values of `type` for the bytes of each channel; null for uint8
  int64_t threads;
  int64_t kernels;  // index into row_kernels()
};

// Resizes every frame (bicubic, as Pillow) and writes its patches. Threads share out bands of rows, over all frames.
// Throws std::bad_alloc, nothing else.
void image_to_patches(const std::vector<FrameJob>& jobs, const PatchOptions& options);

}  // namespace qwen2vl
