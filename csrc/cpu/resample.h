// The two passes of a bicubic resize over single rows, in as many forms as there are instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace qwen2vl {

// Rows that the horizontal pass takes at a time: they share every weight.
constexpr int kRowGroup = 4;
// Planar rows are padded to a multiple of this many bytes, so that vector loops need no tail.
constexpr int64_t kRowAlign = 64;

// The taps of all outputs of one axis. A vector of four bytes times four weights needs weights of one byte: the digits
// hold each quad of taps as three such vectors, w = d0 + 256 d1 + 65536 d2 with digits of -128..127.
struct AxisTaps {
  int64_t in = 0, out = 0;
  std::vector<int32_t> first, count;  // (out)
  std::vector<int64_t> begin;         // (out): where the output's weights start
  std::vector<int32_t> weights;
  std::vector<int32_t> quad_first;  // (out): input of the first tap of the first quad; quads stay within the input
  std::vector<int64_t> quad_begin;  // (out + 1), in quads
  std::vector<int32_t> digits;      // (quads, 3), the digits of four taps from the lowest byte on
  std::vector<int16_t> halves;      // (quads, 8): low 12 bits of taps 0 and 1, the rest of them, then taps 2 and 3
  int32_t most = 0;                 // taps of any output
  int64_t most_quads = 0;           // of any output

  bool identity() const { return in == out; }
  const int32_t* weights_of(int64_t i) const { return weights.data() + begin[static_cast<size_t>(i)]; }
};

AxisTaps make_taps(int64_t in, int64_t out);

// One instruction set's two passes.
//
// horizontal: kRowGroup rows of interleaved RGB to planar rows of `taps.out` bytes; out[r] points at the red plane of
// row r, green and blue follow at plane_stride, which is at least the width rounded up to kRowAlign.
// split: the same without a change of width.
// vertical: `bytes` bytes of output row i from rows[k], k < taps.count[i].
struct RowKernels {
  const char* name;
  void (*horizontal)(const AxisTaps& taps, const uint8_t* const* rows, uint8_t* const* out, int64_t plane_stride);
  void (*split)(const uint8_t* row, int64_t width, uint8_t* out, int64_t plane_stride);
  void (*vertical)(const AxisTaps& taps, int64_t i, const uint8_t* const* rows, uint8_t* out, int64_t bytes);
};

// What this build has and this processor runs, best first; the last one runs everywhere.
const std::vector<RowKernels>& row_kernels();

extern const RowKernels kPortableRows;
#if defined(__x86_64__) && defined(__GNUC__)
extern const RowKernels kAvx2Rows, kAvx512Rows;
#endif

}  // namespace qwen2vl
