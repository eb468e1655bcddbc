// A step of decoding around its products: few rows, all bf16, on threads that sleep between calls. What a step does
// beside the products is little, and every region that is shared out in another way costs them more than it takes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "few_rows.h"

namespace qwen2vl {

// Strides count elements; the elements of a row, and of a head, stand side by side.
struct RmsNorm {
  const uint16_t* x;  // (rows, width)
  int64_t x_stride;
  const uint16_t* weight;  // (width)
  float eps;
};

// Up to three products of the norm of the same rows; `x` of each is set here. An absent one has no outputs.
void rms_norm_linear(const RmsNorm& norm, std::array<FewRows, 3> products, int64_t threads, size_t kernel);

// y = silu(gate) * up, each rounded to bf16 as a product of its own would be. `gate` has y, `up` none.
void rms_norm_swiglu(const RmsNorm& norm, FewRows gate, FewRows up, int64_t threads, size_t kernel, size_t step_kernel);

// y += the product, which is rounded to bf16 first.
void linear_add(FewRows product, int64_t threads, size_t kernel);

// One new token a row: q and k are rotated, k and v stored in slot lengths[row] - 1, and the query heads attend to that
// and the slots before it. A row whose length is not in [1, capacity] stores nothing, and its result is zero.
struct DecodeAttention {
  const uint16_t *q, *k, *v;                                // (rows, heads or kv_heads, columns)
  std::array<int64_t, 2> q_strides, k_strides, v_strides;   // row, head
  uint16_t *k_cache, *v_cache;                              // (rows, capacity, kv_heads, columns)
  std::array<int64_t, 3> k_cache_strides, v_cache_strides;  // row, slot, head
  const int32_t* lengths;                                   // (rows)
  int64_t lengths_stride;
  const void* positions;  // (rows) int32 or int64
  int64_t positions_bytes, positions_stride;
  const float* inv_freq;  // (columns / 2)
  uint16_t* out;          // (rows, heads, columns), dense
  float scale;
  int64_t rows, heads, kv_heads, columns, capacity;
};

// `columns` are a multiple of 16.
void decode_attention(const DecodeAttention& p, int64_t threads, size_t kernel);

// Keys begin to end of a row for the query heads of one key head. Per query head: out += exp(score - largest) v, with
// the largest score, and the sum of the exponentials.
struct KeySplit {
  const float* q;  // (heads, columns), rotated and scaled
  const uint16_t *k, *v;
  int64_t k_stride, v_stride;
  int64_t keys, heads, columns;
  float* scores;               // room for heads x keys, rounded up to 16
  float *out, *largest, *sum;  // (heads, columns), (heads), (heads)
};

// One instruction set's loops. Results depend on the instruction set alone.
struct StepKernel {
  const char* name;
  void (*attend)(const KeySplit& p);
  void (*swiglu)(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t count);
};

// What this build has and this processor runs, best first; the last one runs everywhere.
const std::vector<StepKernel>& step_kernels();

}  // namespace qwen2vl
