#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_72() {
  return attention_kernels_of<
      AttentionConfig<72, 2, 128>,
      AttentionConfig<72, 3, 96> QWEN2VL_TRIED(
          AttentionConfig<72, 2, 128, 1>, AttentionConfig<72, 2, 176>, AttentionConfig<72, 2, 176, 1>,
          AttentionConfig<72, 3, 96, 1>, AttentionConfig<72, 3, 112>, AttentionConfig<72, 3, 112, 1>,
          AttentionConfig<72, 3, 144, 0, true>, AttentionConfig<72, 3, 144, 1, true>,
          AttentionConfig<72, 2, 128, 0, false, 64, 72>, AttentionConfig<72, 3, 96, 0, false, 64, 72>,
          AttentionConfig<72, 3, 96, 0, false, 16, 72>)>();
}

}  // namespace qwen2vl
