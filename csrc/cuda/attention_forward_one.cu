// One kernel under a plain name, for a cubin that attention_load takes: the tuner's, which no build links.
#include "attention_forward.cuh"

namespace {

using Config = qwen2vl::AttentionConfig<QWEN2VL_HEAD, QWEN2VL_CONSUMERS, QWEN2VL_KEYS, QWEN2VL_SHARE, QWEN2VL_P_SHARED,
                                        QWEN2VL_COLUMNS, QWEN2VL_ACROSS>;
constexpr auto kElement = QWEN2VL_FP16 ? qwen2vl::Element::kFloat16 : qwen2vl::Element::kBfloat16;

}  // namespace

extern "C" __global__ void __launch_bounds__(Config::kShape.threads(), 1)
    attention_forward(const __grid_constant__ qwen2vl::TensorMap q, const __grid_constant__ qwen2vl::TensorMap k,
                      const __grid_constant__ qwen2vl::TensorMap v,
                      const __grid_constant__ qwen2vl::AttentionWork work) {
  qwen2vl::attend<Config, kElement, QWEN2VL_CAUSAL>(&q, &k, &v, work);
}
