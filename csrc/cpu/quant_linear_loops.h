// The loops of quant_linear.cpp, which includes this once for each instruction set, in a namespace of its own and with
// QWEN2VL_TARGET to name it: compilers cut vectors into registers before they put functions into one another, so that
// every function here must say for which registers. The namespace has what is
// better told in an instruction set's own words: `sixteen`, `int4`, `fp8` and `multiply_add`.
// No include guard, and no includes, on purpose.

#define QWEN2VL_INLINE QWEN2VL_TARGET inline __attribute__((always_inline))

template <class T, class From>
QWEN2VL_INLINE T load(const From* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// float16 in a lane, by its rules: an exponent of 31 stays the largest, subnormals become normal.
QWEN2VL_INLINE float from_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
  uint32_t small;
  std::memcpy(&small, &tiny, sizeof small);
  bits = magnitude < 0x400u ? small : magnitude >= 0x7c00u ? (magnitude << 13) + (224u << 23) : bits;
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Scales of groups begin to begin + count of an output.
QWEN2VL_INLINE void take_scales(const QuantWeight& p, int64_t output, int64_t begin, int64_t count, float* scales) {
  const int64_t at = output / p.block_outputs * p.scales_stride + begin;
  if (p.scale_type == ScaleType::kFloat32) {
    std::memcpy(scales, static_cast<const float*>(p.scales) + at, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(p.scales) + at;
  if (p.scale_type == ScaleType::kBfloat16) {
    for (int64_t g = 0; g < count; ++g) scales[g] = from_bf16(from[g]);
  } else {
    for (int64_t g = 0; g < count; ++g) scales[g] = from_half(from[g]);
  }
}

template <Quantised KIND>
QWEN2VL_INLINE int32_t zero_of(const QuantWeight& p, int64_t output, int64_t group) {
  if (KIND == Quantised::kFp8) return 0;
  if (p.zeros == nullptr) return KIND == Quantised::kInt4 ? 8 : 128;
  const uint8_t* zeros = p.zeros + output * p.zeros_stride;
  return KIND == Quantised::kInt4 ? (zeros[group / 2] >> (group % 2 * 4)) & 15 : zeros[group];
}

// The values, before their scale, of 32 neighbouring weights; `values` are those of the sixteen integers of 4 bits.
template <Quantised KIND>
QWEN2VL_INLINE void take(const uint8_t* w, int32_t zero, const Floats& values, Floats* low, Floats* high) {
  if (KIND == Quantised::kInt4) {
    int4(w, values, low, high);
  } else if (KIND == Quantised::kInt8) {
    *low = __builtin_convertvector(sixteen(w) - zero, Floats);
    *high = __builtin_convertvector(sixteen(w + kLanes) - zero, Floats);
  } else {
    fp8(w, low, high);
  }
}

QWEN2VL_INLINE Floats values_of_int4(int32_t zero) {
  constexpr Floats kIntegers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return kIntegers - static_cast<float>(zero);
}

QWEN2VL_INLINE float total(const Floats& sums) {
  float lanes[kLanes];
  std::memcpy(lanes, &sums, sizeof lanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <Quantised KIND>
constexpr int64_t bytes_of(int64_t columns) {
  return KIND == Quantised::kInt4 ? columns / 2 : columns;
}

template <Quantised KIND, int M, int N>
QWEN2VL_INLINE void block(const QuantLinear& p, int64_t row, int64_t output) {
  const QuantWeight& q = p.weight;
  const float* x = p.floats + row * q.width;
  const int64_t groups = (q.width + q.block_width - 1) / q.block_width;
  Floats sums[M][N] = {};
  float scales[N][kGroups];
  for (int64_t g = 0; g < groups; ++g) {
    if (g % kGroups == 0) {
      const int64_t count = std::min(kGroups, groups - g);
      for (int n = 0; n < N; ++n) take_scales(q, output + n, g, count, scales[n]);
    }
    Floats low_sums[M][N] = {}, high_sums[M][N] = {};
    int32_t zero[N];
    Floats values[N];
    for (int n = 0; n < N; ++n) {
      zero[n] = zero_of<KIND>(q, output + n, g);
      values[n] = values_of_int4(zero[n]);
    }
    const int64_t begin = g * q.block_width, end = std::min(begin + q.block_width, q.width);
    for (int64_t k = begin; k < end; k += 2 * kLanes) {
      for (int n = 0; n < N; ++n) {
        const uint8_t* at = q.w + (output + n) * q.w_stride + bytes_of<KIND>(k);
        __builtin_prefetch(at + kAhead);
        Floats low, high;
        take<KIND>(at, zero[n], values[n], &low, &high);
        for (int m = 0; m < M; ++m) {
          low_sums[m][n] = multiply_add(low, load<Floats>(x + m * q.width + k), low_sums[m][n]);
          high_sums[m][n] = multiply_add(high, load<Floats>(x + m * q.width + k + kLanes), high_sums[m][n]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n)
        sums[m][n] += (low_sums[m][n] + high_sums[m][n]) * (scales[n][g % kGroups] * kUnit<KIND>);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) put(p, row + m, output + n, total(sums[m][n]));
  }
}

template <Quantised KIND, int M>
QWEN2VL_INLINE void outputs_of(const QuantLinear& p, int64_t row, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + kOutputs <= end; n += kOutputs) block<KIND, M, kOutputs>(p, row, n);
  for (; n < end; ++n) block<KIND, M, 1>(p, row, n);
}

template <Quantised KIND>
QWEN2VL_INLINE void linear_of(const QuantLinear& p, int64_t begin, int64_t end) {
  // A piece of work stays in the caches, so that rows may each pass over it.
  int64_t m = 0;
  for (; m + 4 <= p.rows; m += 4) outputs_of<KIND, 4>(p, m, begin, end);
  for (; m < p.rows; ++m) outputs_of<KIND, 1>(p, m, begin, end);
}

template <Quantised KIND>
QWEN2VL_INLINE void values_of(const QuantValues& p, int64_t begin, int64_t end) {
  const QuantWeight& q = p.weight;
  for (int64_t n = begin; n < end; ++n) {
    float scale;
    for (int64_t k = 0, g = 0; k < q.width; ++g) {
      take_scales(q, n, g, 1, &scale);
      scale *= kUnit<KIND>;
      const int32_t zero = zero_of<KIND>(q, n, g);
      const Floats values = values_of_int4(zero);
      for (const int64_t last = std::min(k + q.block_width, q.width); k < last; k += 2 * kLanes) {
        Floats parts[2];
        take<KIND>(q.w + n * q.w_stride + bytes_of<KIND>(k), zero, values, &parts[0], &parts[1]);
        parts[0] *= scale;
        parts[1] *= scale;
        if (!p.bf16) {
          std::memcpy(static_cast<float*>(p.y) + n * p.y_stride + k, parts, sizeof parts);
          continue;
        }
        float lanes[2 * kLanes];
        std::memcpy(lanes, parts, sizeof lanes);
        uint16_t* to = static_cast<uint16_t*>(p.y) + n * p.y_stride + k;
        for (int64_t lane = 0; lane < 2 * kLanes; ++lane) to[lane] = to_bf16(lanes[lane]);
      }
    }
  }
}

QWEN2VL_INLINE void linear_body(const QuantLinear& p, int64_t begin, int64_t end) {
  switch (p.weight.kind) {
    case Quantised::kInt4:
      return linear_of<Quantised::kInt4>(p, begin, end);
    case Quantised::kInt8:
      return linear_of<Quantised::kInt8>(p, begin, end);
    case Quantised::kFp8:
      return linear_of<Quantised::kFp8>(p, begin, end);
  }
}

QWEN2VL_INLINE void values_body(const QuantValues& p, int64_t begin, int64_t end) {
  switch (p.weight.kind) {
    case Quantised::kInt4:
      return values_of<Quantised::kInt4>(p, begin, end);
    case Quantised::kInt8:
      return values_of<Quantised::kInt8>(p, begin, end);
    case Quantised::kFp8:
      return values_of<Quantised::kFp8>(p, begin, end);
  }
}

QWEN2VL_TARGET void linear(const QuantLinear& p, int64_t begin, int64_t end) { linear_body(p, begin, end); }
QWEN2VL_TARGET void values(const QuantValues& p, int64_t begin, int64_t end) { values_body(p, begin, end); }

#undef QWEN2VL_INLINE
