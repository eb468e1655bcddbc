// Attention on Hopper: what is built, and its launch. Tensors are bfloat16 or float16, by address.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention_shape.h"

namespace qwen2vl {

// A kernel that can be launched: linked into the extension, or loaded from a cubin.
struct AttentionKernel {
  AttentionShape shape;
  bool fp16, causal;
  const void* function;  // of the CUDA runtime; null where it was loaded
  void* loaded;          // a CUkernel of the driver
};

// (rows, heads, columns) in device memory; strides in elements, columns contiguous.
struct AttentionTensor {
  const void* data;
  int64_t row_stride, head_stride, rows;
};

struct AttentionCall {
  AttentionTensor q, k, v;
  int32_t kv_heads;
  AttentionShape shape;
  bool fp16, causal;
  AttentionWork work;
};

// Kernels that are linked; none where the build left them out.
std::vector<AttentionKernel> attention_kernels();

// Launches one kernel on one stream; what went wrong, or an empty text.
std::string attention_forward_cuda(const AttentionCall& call, int device, void* stream);

// Adds the kernel of a cubin that was compiled from attention_forward_one.cu; what went wrong, or an empty text.
std::string attention_load(const std::string& path, const AttentionShape& shape, bool fp16, bool causal);

}  // namespace qwen2vl
