// y = x w^T for few rows of x and a quantised w, sums in float32; and the values of a quantised w.
// The layout is that of qwen2vl_kernels/core/quant_layout.py: see there for what lies where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "few_rows.h"

namespace qwen2vl {

enum class Quantised { kInt4, kInt8, kFp8 };
enum class ScaleType { kFloat32, kBfloat16, kFloat16 };

// Strides count elements, which are bytes but for scales, x and y. `width`, and `block_width` where it is less than the
// width, are multiples of 32.
struct QuantWeight {
  const uint8_t* w;  // (outputs, width), or half as wide for 4 bits
  int64_t w_stride;
  const void* scales;  // (outputs / block_outputs, width / block_width), both rounded up
  int64_t scales_stride;
  ScaleType scale_type;
  const uint8_t* zeros;  // packed, or null: 8 or 128 everywhere
  int64_t zeros_stride;
  Quantised kind;
  int64_t outputs, width, block_outputs, block_width;
};

// x, bias and y are float, or all bf16.
struct QuantLinear {
  QuantWeight weight;
  const void* x;  // (rows, width)
  int64_t x_stride;
  const void* bias;  // (outputs), or null
  void* y;           // (rows, outputs)
  int64_t y_stride;
  bool bf16;
  int64_t rows;
  // What quant_linear makes of x for a kernel: dense rows of float, or those of bf16 as its `arrange` leaves them.
  const float* floats;
  const uint16_t* halves;
};

struct QuantValues {
  QuantWeight weight;
  void* y;  // (outputs, width), float or bf16
  int64_t y_stride;
  bool bf16;
};

// One instruction set's results of the outputs begin to end, end excluded. Sums have the same order whatever the rows
// and the outputs beside them.
struct QuantKernel {
  const char* name;
  // A row of bf16 in the order in which `linear` meets it; null where it takes floats alone. False where it takes those
  // for such a weight, and nothing is written.
  bool (*arrange)(const QuantWeight& p, const uint16_t* row, uint16_t* arranged);
  void (*linear)(const QuantLinear& p, int64_t begin, int64_t end);
  void (*values)(const QuantValues& p, int64_t begin, int64_t end);
};

// What this build has and this processor runs, best first; the last one runs everywhere.
const std::vector<QuantKernel>& quant_kernels();

#if defined(__x86_64__) && defined(__GNUC__)
// AVX-512's for halves.
bool arrange_avx512(const QuantWeight& p, const uint16_t* row, uint16_t* arranged);
void quant_linear_avx512(const QuantLinear& p, int64_t begin, int64_t end);
#endif

// One output of one row, with its bias, rounded once.
inline void put(const QuantLinear& p, int64_t row, int64_t output, float sum) {
  const int64_t at = row * p.y_stride + output;
  if (p.bf16) {
    if (p.bias != nullptr) sum += from_bf16(static_cast<const uint16_t*>(p.bias)[output]);
    static_cast<uint16_t*>(p.y)[at] = to_bf16(sum);
  } else {
    if (p.bias != nullptr) sum += static_cast<const float*>(p.bias)[output];
    static_cast<float*>(p.y)[at] = sum;
  }
}

// With up to `threads` threads and the kernel of that index. `floats` and `halves` are set here.
void quant_linear(QuantLinear p, int64_t threads, size_t kernel);
void quant_values(const QuantValues& p, int64_t threads, size_t kernel);

}  // namespace qwen2vl
