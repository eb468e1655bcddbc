#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_96() {
  return attention_kernels_of<AttentionConfig<96, 2, 128>,
                              AttentionConfig<96, 3, 96> QWEN2VL_TRIED(
                                  AttentionConfig<96, 2, 128, 1>, AttentionConfig<96, 2, 176>,
                                  AttentionConfig<96, 2, 176, 1>, AttentionConfig<96, 3, 80>,
                                  AttentionConfig<96, 3, 80, 1>, AttentionConfig<96, 3, 96, 1>,
                                  AttentionConfig<96, 3, 128, 0, true>, AttentionConfig<96, 3, 128, 1, true>)>();
}

}  // namespace qwen2vl
