#include "attention_kernels.cuh"

namespace qwen2vl {

std::vector<AttentionKernel> attention_kernels_128() {
  return attention_kernels_of<AttentionConfig<128, 2, 128> QWEN2VL_TRIED(
      AttentionConfig<128, 2, 96>, AttentionConfig<128, 2, 96, 1>, AttentionConfig<128, 2, 128, 1>,
      AttentionConfig<128, 2, 144>, AttentionConfig<128, 2, 144, 1>, AttentionConfig<128, 2, 160>,
      AttentionConfig<128, 2, 160, 1>, AttentionConfig<128, 3, 64>, AttentionConfig<128, 3, 64, 1>,
      AttentionConfig<128, 3, 80>, AttentionConfig<128, 3, 80, 1>)>();
}

}  // namespace qwen2vl
