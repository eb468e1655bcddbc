// The passes as plain loops. Each instruction set's file inlines them into functions of its own, where the compiler
// vectorises them for it.
#pragma once

#include <cstdint>

#include "../common/bicubic.h"
#include "resample.h"

#define QWEN2VL_INLINE static inline __attribute__((always_inline))

namespace qwen2vl {

// Outputs from `begin` on.
QWEN2VL_INLINE void horizontal_row(const AxisTaps& taps, const uint8_t* __restrict row, int64_t begin,
                                   uint8_t* __restrict out, int64_t plane_stride) {
  for (int64_t i = begin; i < taps.out; ++i) {
    const auto at = static_cast<size_t>(i);
    const uint8_t* pixel = row + 3 * static_cast<int64_t>(taps.first[at]);
    const int32_t* const weights = taps.weights_of(i);
    int32_t red = kHalfWeight, green = kHalfWeight, blue = kHalfWeight;
    for (int32_t k = 0; k < taps.count[at]; ++k, pixel += 3) {
      red += weights[k] * pixel[0];
      green += weights[k] * pixel[1];
      blue += weights[k] * pixel[2];
    }
    out[i] = weighted_byte(red);
    out[i + plane_stride] = weighted_byte(green);
    out[i + 2 * plane_stride] = weighted_byte(blue);
  }
}

QWEN2VL_INLINE void split_row(const uint8_t* __restrict row, int64_t width, uint8_t* __restrict out,
                              int64_t plane_stride) {
  uint8_t* __restrict const red = out;
  uint8_t* __restrict const green = out + plane_stride;
  uint8_t* __restrict const blue = out + 2 * plane_stride;
  for (int64_t i = 0; i < width; ++i) {
    red[i] = row[3 * i];
    green[i] = row[3 * i + 1];
    blue[i] = row[3 * i + 2];
  }
}

// Bytes from `begin` on, with up to four taps: the sum stays in registers.
QWEN2VL_INLINE void vertical_few(const uint8_t* const* rows, const int32_t* weights, int32_t count, int64_t begin,
                                 uint8_t* __restrict out, int64_t bytes) {
  const uint8_t* __restrict const a = rows[0];
  const uint8_t* __restrict const b = rows[count > 1 ? 1 : 0];
  const uint8_t* __restrict const c = rows[count > 2 ? 2 : 0];
  const uint8_t* __restrict const d = rows[count > 3 ? 3 : 0];
  const int32_t wa = weights[0], wb = count > 1 ? weights[1] : 0;
  const int32_t wc = count > 2 ? weights[2] : 0, wd = count > 3 ? weights[3] : 0;
  for (int64_t i = begin; i < bytes; ++i) {
    out[i] = weighted_byte(kHalfWeight + wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i]);
  }
}

QWEN2VL_INLINE void vertical_rows(const AxisTaps& taps, int64_t at, const uint8_t* const* rows, int64_t begin,
                                  uint8_t* __restrict out, int64_t bytes) {
  const int32_t* const weights = taps.weights_of(at);
  const int32_t count = taps.count[static_cast<size_t>(at)];
  if (count <= 4) return vertical_few(rows, weights, count, begin, out, bytes);
  for (int64_t start = begin; start < bytes; start += kRowAlign) {
    const int64_t size = bytes - start < kRowAlign ? bytes - start : kRowAlign;
    int32_t sums[kRowAlign];
    for (int32_t& sum : sums) sum = kHalfWeight;
    int32_t k = 0;
    for (; k + 4 <= count; k += 4) {
      const uint8_t* __restrict const a = rows[k] + start;
      const uint8_t* __restrict const b = rows[k + 1] + start;
      const uint8_t* __restrict const c = rows[k + 2] + start;
      const uint8_t* __restrict const d = rows[k + 3] + start;
      for (int64_t i = 0; i < size; ++i) {
        sums[i] += weights[k] * a[i] + weights[k + 1] * b[i] + weights[k + 2] * c[i] + weights[k + 3] * d[i];
      }
    }
    for (; k < count; ++k) {
      const uint8_t* __restrict const row = rows[k] + start;
      for (int64_t i = 0; i < size; ++i) sums[i] += weights[k] * row[i];
    }
    for (int64_t i = 0; i < size; ++i) out[start + i] = weighted_byte(sums[i]);
  }
}

}  // namespace qwen2vl
