#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_64() {
  return attention_kernels_of<AttentionConfig<64, 2, 128>, AttentionConfig<64, 3, 128>>();
}

}  // namespace qwen2vl
