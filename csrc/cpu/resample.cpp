#include "resample.h"

#include <algorithm>

#include "../common/bicubic.h"
#include "resample_loops.h"

namespace qwen2vl {
namespace {

constexpr int kQuad = 4;

// Splits the weights of one output into quads; taps of a quad that lie beside the window weigh nothing.
void append_quads(AxisTaps& taps, int64_t i) {
  const auto at = static_cast<size_t>(i);
  const int32_t first = taps.first[at], count = taps.count[at];
  const int32_t* const weights = taps.weights_of(i);
  int32_t quads = (count + kQuad - 1) / kQuad;
  // Shifted left where the last quad would otherwise read past the row's end.
  const int32_t start = std::min<int64_t>(first, std::max<int64_t>(taps.in - int64_t{kQuad} * quads, 0));
  quads = std::max((first + count - start + kQuad - 1) / kQuad, 1);
  taps.quad_first[at] = start;
  for (int32_t quad = 0; quad < quads; ++quad) {
    uint32_t digits[3] = {0, 0, 0};
    int16_t low[kQuad], high[kQuad];
    for (int32_t lane = 0; lane < kQuad; ++lane) {
      const int32_t tap = start + quad * kQuad + lane - first;
      const int32_t weight = tap >= 0 && tap < count ? weights[tap] : 0;
      const int32_t d0 = static_cast<int8_t>(weight & 255), rest = (weight - d0) >> 8;
      const int32_t d1 = static_cast<int8_t>(rest & 255), d2 = (rest - d1) >> 8;
      const int32_t lane_digits[3] = {d0, d1, d2};
      for (int d = 0; d < 3; ++d) digits[d] |= static_cast<uint32_t>(lane_digits[d] & 255) << (8 * lane);
      low[lane] = static_cast<int16_t>(weight & 4095);
      high[lane] = static_cast<int16_t>(weight >> 12);
    }
    for (const uint32_t digit : digits) taps.digits.push_back(static_cast<int32_t>(digit));
    taps.halves.insert(taps.halves.end(), {low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3]});
  }
  taps.quad_begin[at + 1] = taps.quad_begin[at] + quads;
}

void horizontal_portable(const AxisTaps& taps, const uint8_t* const* rows, uint8_t* const* out, int64_t plane_stride) {
  for (int r = 0; r < kRowGroup; ++r) horizontal_row(taps, rows[r], 0, out[r], plane_stride);
}

void split_portable(const uint8_t* row, int64_t width, uint8_t* out, int64_t plane_stride) {
  split_row(row, width, out, plane_stride);
}

void vertical_portable(const AxisTaps& taps, int64_t i, const uint8_t* const* rows, uint8_t* out, int64_t bytes) {
  vertical_rows(taps, i, rows, 0, out, bytes);
}

}  // namespace

const RowKernels kPortableRows{"portable", horizontal_portable, split_portable, vertical_portable};

AxisTaps make_taps(int64_t in, int64_t out) {
  const BicubicAxis axis{in, out};
  AxisTaps taps;
  taps.in = in;
  taps.out = out;
  const auto size = static_cast<size_t>(out);
  taps.first.resize(size);
  taps.count.resize(size);
  taps.begin.resize(size);
  taps.quad_first.resize(size);
  taps.quad_begin.assign(size + 1, 0);
  for (int64_t i = 0; i < out; ++i) {
    const auto at = static_cast<size_t>(i);
    const TapWindow window = axis.window(i);
    taps.first[at] = window.first;
    taps.count[at] = window.count;
    taps.begin[at] = static_cast<int64_t>(taps.weights.size());
    taps.weights.resize(taps.weights.size() + static_cast<size_t>(window.count));
    axis.weights(i, taps.weights.data() + taps.begin[at]);
    append_quads(taps, i);
    taps.most = std::max(taps.most, window.count);
    taps.most_quads = std::max(taps.most_quads, taps.quad_begin[at + 1] - taps.quad_begin[at]);
  }
  return taps;
}

const std::vector<RowKernels>& row_kernels() {
  static const std::vector<RowKernels> kernels = [] {
    std::vector<RowKernels> usable;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
      usable.push_back(kAvx512Rows);
    }
    if (__builtin_cpu_supports("avx2")) usable.push_back(kAvx2Rows);
#endif
    usable.push_back(kPortableRows);
    return usable;
  }();
  return kernels;
}

}  // namespace qwen2vl
