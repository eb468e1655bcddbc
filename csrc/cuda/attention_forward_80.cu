#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_80() {
  return attention_kernels_of<AttentionConfig<80, 2, 128>,
                              AttentionConfig<80, 3, 96> QWEN2VL_TRIED(
                                  AttentionConfig<80, 2, 128, 1>, AttentionConfig<80, 2, 176>,
                                  AttentionConfig<80, 2, 176, 1>, AttentionConfig<80, 3, 96, 1>,
                                  AttentionConfig<80, 3, 112>, AttentionConfig<80, 3, 112, 1>,
                                  AttentionConfig<80, 3, 144, 0, true>, AttentionConfig<80, 3, 144, 1, true>,
                                  AttentionConfig<80, 2, 128, 0, false, 64>, AttentionConfig<80, 3, 96, 0, false, 64>,
                                  AttentionConfig<80, 3, 96, 0, false, 32>)>();
}

}  // namespace qwen2vl
