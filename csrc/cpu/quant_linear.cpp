// One body in the compiler's vectors of sixteen, built for each instruction set: the compiler cuts such a vector into
// as many registers as it takes.
#include "quant_linear.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "few_rows.h"
#include "workers.h"

// Vectors are passed between functions that are all inlined, where no convention of calls applies.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace qwen2vl {
namespace {

constexpr int64_t kLanes = 16;
// Bytes of weights in a piece of work, as in few_rows.cpp.
constexpr int64_t kPieceBytes = 64 << 10;
// Outputs that a loop takes at once: each has a chain of additions of its own.
constexpr int64_t kOutputs = 2;
// Scales are converted so many groups at a time.
constexpr int64_t kGroups = 64;
// How far ahead of the sums a weight is asked for, in bytes.
constexpr int64_t kAhead = 1024;

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

// What a value of one kind is to be multiplied with beside its scale: numbers of 8 bits are made 2^8 too small, with
// the exponent of float16.
template <Quantised KIND>
constexpr float kUnit = KIND == Quantised::kFp8 ? 256.0f : 1.0f;

namespace portable {
#define QWEN2VL_TARGET
#include "quant_linear_words.h"

#include "quant_linear_loops.h"
#undef QWEN2VL_TARGET
}  // namespace portable

#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
#define QWEN2VL_TARGET __attribute__((target("avx2,fma")))
#define QWEN2VL_SIXTEEN_AVX2
#include "quant_linear_words.h"
#undef QWEN2VL_SIXTEEN_AVX2

#include "quant_linear_loops.h"
#undef QWEN2VL_TARGET
}  // namespace avx2

namespace avx512 {
#define QWEN2VL_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))

QWEN2VL_TARGET inline __m512i sixteen512(const uint8_t* bytes) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

QWEN2VL_TARGET inline Ints sixteen(const uint8_t* bytes) { return (Ints)sixteen512(bytes); }

QWEN2VL_TARGET inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& sum) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}

// A permutation looks at the lowest four bits of each index.
QWEN2VL_TARGET inline void int4(const uint8_t* bytes, const Floats& values, Floats* low, Floats* high) {
  const __m512i first = sixteen512(bytes);
  *low = (Floats)_mm512_permutexvar_ps(first, (__m512)values);
  *high = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(first, 4), (__m512)values);
}

// Exponent and mantissa where those of float16 begin, whose conversion knows subnormal numbers.
QWEN2VL_TARGET inline void fp8(const uint8_t* bytes, Floats* low, Floats* high) {
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
  const __m512i placed = _mm512_srai_epi16(_mm512_slli_epi16(wide, 8), 1);
  const __m512i largest = _mm512_set1_epi16(0x3f80);
  const __m512i magnitude = _mm512_and_si512(placed, largest);
  const __mmask32 no_number = _mm512_cmpeq_epi16_mask(magnitude, largest);
  const __m512i half = _mm512_and_si512(placed, _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
  const __m512i values = _mm512_mask_mov_epi16(half, no_number, _mm512_set1_epi16(0x7e00));
  *low = (Floats)_mm512_cvtph_ps(_mm512_castsi512_si256(values));
  *high = (Floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(values, 1));
}

#include "quant_linear_loops.h"
#undef QWEN2VL_TARGET
}  // namespace avx512

void linear_avx512(const QuantLinear& p, int64_t begin, int64_t end) {
  (p.halves != nullptr ? quant_linear_avx512 : avx512::linear)(p, begin, end);
}
#endif

// In pieces of whole pairs of outputs, so that which loop takes an output does not depend on the threads.
template <class Work>
void in_pieces(const QuantWeight& p, int64_t threads, const Work& work) {
  const int64_t row = std::max<int64_t>(p.kind == Quantised::kInt4 ? p.width / 2 : p.width, 1);
  const int64_t each = std::max(kPieceBytes / row / kOutputs, int64_t{1}) * kOutputs;
  run_pieces(threads, (p.outputs + each - 1) / each, [&](int64_t piece) {
    const int64_t begin = piece * each;
    work(begin, std::min(begin + each, p.outputs));
  });
}

}  // namespace

const std::vector<QuantKernel>& quant_kernels() {
  static const std::vector<QuantKernel> kernels = [] {
    std::vector<QuantKernel> usable;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      usable.push_back({"avx512", arrange_avx512, linear_avx512, avx512::values});
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      usable.push_back({"avx2", nullptr, avx2::linear, avx2::values});
    }
#endif
    usable.push_back({"portable", nullptr, portable::linear, portable::values});
    return usable;
  }();
  return kernels;
}

void quant_linear(QuantLinear p, int64_t threads, size_t kernel) {
  const auto arrange = quant_kernels()[kernel].arrange;
  const auto linear = quant_kernels()[kernel].linear;
  const int64_t width = p.weight.width;
  // Room that a thread keeps between calls.
  thread_local std::vector<uint16_t> halves;
  thread_local std::vector<float> floats;
  const auto row_of = [&](int64_t row) { return static_cast<const uint16_t*>(p.x) + row * p.x_stride; };
  const auto room = [&](auto& held) {
    if (held.size() < static_cast<size_t>(p.rows * width)) held.resize(static_cast<size_t>(p.rows * width));
    return held.data();
  };
  p.floats = nullptr;
  p.halves = nullptr;
  if (p.bf16 && arrange != nullptr && p.rows > 0) {
    uint16_t* to = room(halves);
    bool arranged = true;
    for (int64_t row = 0; row < p.rows && arranged; ++row) {
      arranged = arrange(p.weight, row_of(row), to + row * width);
    }
    if (arranged) p.halves = to;
  }
  if (p.halves == nullptr && !p.bf16 && (p.x_stride == width || p.rows == 1)) {
    p.floats = static_cast<const float*>(p.x);
  } else if (p.halves == nullptr) {
    float* to = room(floats);
    for (int64_t row = 0; row < p.rows; ++row) {
      if (p.bf16) {
        for (int64_t k = 0; k < width; ++k) to[row * width + k] = from_bf16(row_of(row)[k]);
      } else {
        std::memcpy(to + row * width, static_cast<const float*>(p.x) + row * p.x_stride,
                    static_cast<size_t>(width) * sizeof(float));
      }
    }
    p.floats = to;
  }
  in_pieces(p.weight, threads, [&](int64_t begin, int64_t end) { linear(p, begin, end); });
}

void quant_values(const QuantValues& p, int64_t threads, size_t kernel) {
  const auto values = quant_kernels()[kernel].values;
  in_pieces(p.weight, threads, [&](int64_t begin, int64_t end) { values(p, begin, end); });
}

}  // namespace qwen2vl
