// y = x w^T for few rows of x and a quantised w, sums in float32; and the values of a quantised w.
// The layout is that of qwen2vl_kernels/core/quant_layout.py: see there for what lies where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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

struct QuantLinear {
  QuantWeight weight;
  const float* x;  // (rows, width)
  int64_t x_stride;
  float* y;  // (rows, outputs)
  int64_t y_stride;
  int64_t rows;
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
  void (*linear)(const QuantLinear& p, int64_t begin, int64_t end);
  void (*values)(const QuantValues& p, int64_t begin, int64_t end);
};

// What this build has and this processor runs, best first; the last one runs everywhere.
const std::vector<QuantKernel>& quant_kernels();

// With up to `threads` threads and the kernel of that index.
void quant_linear(const QuantLinear& p, int64_t threads, size_t kernel);
void quant_values(const QuantValues& p, int64_t threads, size_t kernel);

}  // namespace qwen2vl
