// The kernels of one head width as entries of a list; each width is a translation unit.
#pragma once

#include <vector>

#include "attention.h"
#include "attention_forward.cuh"

// Configurations that the tuner tries besides those that calls take; a build has them where it is told to.
#ifdef QWEN2VL_SM90_ALL
#define QWEN2VL_TRIED(...) , __VA_ARGS__
#else
#define QWEN2VL_TRIED(...)
#endif

namespace qwen2vl {

template <class Config, Element E, bool Causal>
AttentionKernel attention_kernel() {
  return {Config::kShape, E == Element::kFloat16, Causal,
          reinterpret_cast<const void*>(&attention_forward<Config, E, Causal>), nullptr};
}

template <class... Configs>
std::vector<AttentionKernel> attention_kernels_of() {
  std::vector<AttentionKernel> all;
  const auto add = [&](auto config) {
    using Config = decltype(config);
    all.push_back(attention_kernel<Config, Element::kBfloat16, false>());
    all.push_back(attention_kernel<Config, Element::kBfloat16, true>());
    all.push_back(attention_kernel<Config, Element::kFloat16, false>());
    all.push_back(attention_kernel<Config, Element::kFloat16, true>());
  };
  (add(Configs{}), ...);
  return all;
}

}  // namespace qwen2vl
