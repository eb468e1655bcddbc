#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_80() {
  return attention_kernels_of<AttentionConfig<80, 2, 128, 0, false>, AttentionConfig<80, 3, 96, 0, false>>();
}

}  // namespace qwen2vl
