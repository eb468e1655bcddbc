#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_80() {
  return attention_kernels_of<AttentionConfig<80, 2, 128>, AttentionConfig<80, 3, 96>>();
}

}  // namespace qwen2vl
