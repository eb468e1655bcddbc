// Pillow's antialiased bicubic resize of 8-bit pixels, one axis at a time, shared by host and device.
//
// Output pixel i of an axis that shrinks or grows from `in` to `out` pixels looks at the input around
// c = (i + 1/2) in/out through the cubic kernel of Keys (a = -1/2), stretched by s = max(1, in/out) so that it also
// filters: w_j ~ k((j + 1/2 - c) / s) for the j within 2 s of c, normalised to sum to one, then rounded to 22
// fractional bits. A pass is sum_j w_j p_j + 1/2 in those bits, shifted and clipped to 0..255; the horizontal pass
// comes first and the vertical one reads its bytes. All of it is integer arithmetic once the weights are there, so
// every order of summation gives the same bytes. The weights are computed in double with one rounding an operation:
// whatever compiles this header must not contract multiply-adds (-ffp-contract=off, -fmad=false).
#pragma once

#include <cstdint>

#include "macros.h"

namespace qwen2vl {

constexpr int kWeightBits = 22;  // 8 bits of pixel, 2 of headroom for the kernel's overshoot, in 32

QWEN2VL_HD inline double cubic_kernel(double x) {
  constexpr double a = -0.5;
  if (x < 0) x = -x;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

// The taps of one output pixel: `count` input pixels from `first` on.
struct TapWindow {
  int32_t first, count;
};

struct BicubicAxis {
  int64_t in, out;

  QWEN2VL_HD double scale() const { return static_cast<double>(in) / static_cast<double>(out); }
  QWEN2VL_HD double stretch() const { return scale() < 1 ? 1 : scale(); }
  QWEN2VL_HD double center(int64_t i) const { return (static_cast<double>(i) + 0.5) * scale(); }

  // An upper bound of `count` over all outputs.
  QWEN2VL_HD int64_t most_taps() const {
    const int64_t widest = static_cast<int64_t>(4 * stretch()) + 2;
    return widest < in ? widest : in;
  }

  QWEN2VL_HD TapWindow window(int64_t i) const {
    const double support = 2 * stretch();
    int64_t first = static_cast<int64_t>(center(i) - support + 0.5);
    int64_t last = static_cast<int64_t>(center(i) + support + 0.5);
    if (first < 0) first = 0;
    if (last > in) last = in;
    return {static_cast<int32_t>(first), static_cast<int32_t>(last - first)};
  }

  // Writes the weights of window(i), in units of 2^-kWeightBits, `stride` apart.
  QWEN2VL_HD void weights(int64_t i, int32_t* out_weights, int64_t stride = 1) const {
    const TapWindow taps = window(i);
    const double c = center(i), shrink = 1.0 / stretch();
    double sum = 0;
    for (int32_t j = 0; j < taps.count; ++j) sum += cubic_kernel((j + taps.first - c + 0.5) * shrink);
    for (int32_t j = 0; j < taps.count; ++j) {
      double weight = cubic_kernel((j + taps.first - c + 0.5) * shrink);
      if (sum != 0) weight /= sum;
      weight *= 1 << kWeightBits;
      out_weights[j * stride] = static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
  }
};

// Which pass comes first shows in the last bit. Pillow 13 begins with the rows of images that lose more than twice as
// many rows as columns; every version before it begins with the columns.
QWEN2VL_HD inline bool vertical_first(int64_t height, int64_t width, int64_t out_height, int64_t out_width) {
  return height > out_height && height - out_height > 2 * (width - out_width);
}

constexpr int32_t kHalfWeight = 1 << (kWeightBits - 1);

// A sum of weights times bytes, with kHalfWeight already added, as a byte.
QWEN2VL_HD inline uint8_t weighted_byte(int32_t sum) {
  const int32_t value = sum >> kWeightBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// A byte of given opacity over white, rounded as Pillow's alpha_composite does.
QWEN2VL_HD inline uint8_t over_white(uint32_t value, uint32_t alpha) {
  const uint32_t mixed = (value * alpha + 255 * (255 - alpha)) * 128 + 0x4000;
  return static_cast<uint8_t>((((mixed >> 8) + mixed) >> 8) >> 7);
}

}  // namespace qwen2vl
