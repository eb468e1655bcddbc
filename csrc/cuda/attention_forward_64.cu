#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_64() {
  return attention_kernels_of<AttentionConfig<64, 2, 128>,
                              AttentionConfig<64, 3, 128> QWEN2VL_TRIED(
                                  AttentionConfig<64, 2, 128, 1>, AttentionConfig<64, 2, 176>,
                                  AttentionConfig<64, 2, 176, 1>, AttentionConfig<64, 3, 96>,
                                  AttentionConfig<64, 3, 96, 1>, AttentionConfig<64, 3, 128, 1>)>();
}

}  // namespace qwen2vl
