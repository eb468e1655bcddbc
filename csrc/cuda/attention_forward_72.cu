#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_72() {
  return attention_kernels_of<AttentionConfig<72, 2, 128>, AttentionConfig<72, 3, 96>>();
}

}  // namespace qwen2vl
