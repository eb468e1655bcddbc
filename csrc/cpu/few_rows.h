// y = x w^T + bias for few rows of x, all bf16, sums in float32: what a decoder does with every weight for each token.
// The weights are read once whatever the number of rows, and their reading is all that takes time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "workers.h"

namespace qwen2vl {

// Strides count elements; the elements of a row stand side by side.
struct FewRows {
  const uint16_t* x;  // (rows, width)
  int64_t x_stride;
  const uint16_t* w;  // (outputs, width)
  int64_t w_stride;
  const uint16_t* bias;  // (outputs), or null
  uint16_t* y;           // (rows, outputs)
  int64_t y_stride;
  int64_t rows, outputs, width;
};

// One instruction set's sums of the outputs begin to end, end excluded. A sum has the same order whatever the rows
// beside it and the outputs beside it, so that its bits depend on the instruction set alone.
struct FewRowsKernel {
  const char* name;
  void (*outputs)(const FewRows& p, int64_t begin, int64_t end);
};

// What this build has and this processor runs, best first; the last one runs everywhere.
const std::vector<FewRowsKernel>& few_rows_kernels();

extern const FewRowsKernel kPortableFewRows;
#if defined(__x86_64__) && defined(__GNUC__)
extern const FewRowsKernel kAvx2FewRows, kAvx512FewRows;
#endif

// With up to `threads` threads and the kernel of that index, one product behind the other.
void few_rows(const FewRows* products, size_t count, int64_t threads, size_t kernel);

// Outputs that a thread takes at a time, whole blocks of every kernel.
int64_t outputs_of_a_piece(const FewRows& p);

inline int64_t pieces_of_outputs(const FewRows& p) {
  const int64_t each = outputs_of_a_piece(p);
  return (p.outputs + each - 1) / each;
}

// Call work(begin, end) for pieces of the outputs, shared out among threads.
template <class Work>
void in_pieces_of_outputs(const FewRows& p, int64_t threads, const Work& work) {
  const int64_t each = outputs_of_a_piece(p);
  run_pieces(threads, pieces_of_outputs(p),
             [&](int64_t piece) { work(piece * each, std::min((piece + 1) * each, p.outputs)); });
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounded to nearest, ties to even; what is no number stays none.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void store(const FewRows& p, int64_t row, int64_t output, float sum) {
  if (p.bias != nullptr) sum += from_bf16(p.bias[output]);
  p.y[row * p.y_stride + output] = to_bf16(sum);
}

}  // namespace qwen2vl
