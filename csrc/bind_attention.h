// How a call of attention arrives from Python, with what would make the kernel or TMA fail refused.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "cuda/attention.h"

namespace qwen2vl {

using RawHeads = std::array<int64_t, 4>;  // address, row stride and head stride in elements, rows

using RawConfig = std::array<int64_t, 6>;

// TMA steps by multiples of 16 bytes, from addresses that are multiples of it.
inline AttentionTensor attention_tensor(const char* name, const RawHeads& raw, int64_t heads) {
  const auto refuse = [&](const std::string& what) { throw pybind11::value_error(std::string(name) + what); };
  if (raw[3] < 0 || raw[3] > std::numeric_limits<int32_t>::max()) refuse(": rows must be in [0, 2^31)");
  if (raw[3] > 0 && raw[0] % 16 != 0) refuse(": its address must be a multiple of 16 bytes");
  const std::array<int64_t, 2> steps{raw[3] > 1 ? raw[1] : 8, heads > 1 ? raw[2] : 8};
  for (const int64_t step : steps) {
    if (step <= 0 || step % 8 != 0 || step >= int64_t{1} << 39) {
      refuse(": strides must be positive multiples of 8 elements below 2^39, got " + std::to_string(step));
    }
  }
  return {reinterpret_cast<const void*>(raw[0]), raw[1], raw[2], raw[3]};
}

// config: consumers, keys a step, share, p through shared memory, columns of a block and of p v.
inline AttentionShape attention_shape(int64_t head, const RawConfig& config) {
  const auto number = [&](size_t at) { return static_cast<int>(config[at]); };
  const AttentionShape shape{static_cast<int>(head), number(0), number(1), number(2),
                             config[3] != 0,         number(4), number(5)};
  if (!shape.valid()) {
    std::string told;
    for (const int64_t one : config) told += (told.empty() ? "" : ", ") + std::to_string(one);
    throw pybind11::value_error("no kernel has heads of " + std::to_string(head) + " with the configuration (" + told +
                                ")");
  }
  return shape;
}

inline AttentionCall attention_call(const RawHeads& q, const RawHeads& k, const RawHeads& v, int64_t out, int64_t lse,
                                    const std::array<int64_t, 3>& tiles, const std::array<int64_t, 5>& sizes,
                                    const RawConfig& config, const std::array<int64_t, 2>& bounds, double scale) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto check = [](bool ok, const char* words) {
    if (!ok) throw pybind11::value_error(words);
  };
  const auto [heads, kv_heads, head, fp16, causal] = sizes;
  check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && heads <= kMost,
        "query heads must be a multiple of key heads");
  check(tiles[1] >= 0 && tiles[1] <= kMost, "tiles must be fewer than 2^31");
  check(tiles[2] == 3 || tiles[2] == 4, "tiles must have 3 or 4 columns");
  check(bounds[0] >= -1 && bounds[0] <= bounds[1] && bounds[1] <= kMost,
        "bounds must be in [-1, 2^31), the least first");
  check(scale > 0 && std::isfinite(scale), "scale must be positive");
  check(out % 16 == 0, "out: its address must be a multiple of 16 bytes");
  const AttentionWork work{reinterpret_cast<const int32_t*>(tiles[0]),
                           static_cast<int32_t>(tiles[1]),
                           static_cast<int32_t>(tiles[2]),
                           static_cast<int32_t>(bounds[0]),
                           static_cast<int32_t>(bounds[1]),
                           static_cast<int32_t>(heads),
                           static_cast<int32_t>(heads / kv_heads),
                           reinterpret_cast<uint16_t*>(out),
                           reinterpret_cast<float*>(lse),
                           q[3],
                           static_cast<float>(scale)};
  return {attention_tensor("q", q, heads),
          attention_tensor("k", k, kv_heads),
          attention_tensor("v", v, kv_heads),
          static_cast<int32_t>(kv_heads),
          attention_shape(head, config),
          fp16 != 0,
          causal != 0,
          work};
}

}  // namespace qwen2vl
