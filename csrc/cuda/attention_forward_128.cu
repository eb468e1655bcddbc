#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_128() { return attention_kernels_of<AttentionConfig<128, 2, 128>>(); }

}  // namespace qwen2vl
