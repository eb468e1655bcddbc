#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_96() {
  return attention_kernels_of<AttentionConfig<96, 2, 128>, AttentionConfig<96, 3, 96>>();
}

}  // namespace qwen2vl
