// AVX-512, for rows of bf16. Every number of 4 or 8 bits, less its zero point, is one of bf16, too, of which a register
// holds 32, so that less is done for each of them than in float, and nothing is rounded before the sums.
#include "quant_linear.h"

#if defined(__x86_64__) && defined(__GNUC__)

// GCC 12's own headers leave a value undefined on purpose and then warn about it.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "bf16_avx512.h"
#include "few_rows.h"

#define QWEN2VL_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))

namespace qwen2vl {
namespace {

// Outputs at a time.
constexpr int kOutputs = 2;
// Scales are converted so many groups at a time.
constexpr int64_t kGroups = 64;
// How far ahead of the sums a weight is asked for, in bytes.
constexpr int64_t kAhead = 4096;

// Columns at a time, of 32 bytes.
constexpr int64_t step_of(Quantised kind) { return kind == Quantised::kInt4 ? 64 : 32; }

bool fits(const QuantWeight& p) {
  const int64_t step = step_of(p.kind);
  return p.width % step == 0 && (p.block_width >= p.width || p.block_width % step == 0);
}

// Of words whose lowest four bits are looked at: a permutation looks at five.
struct alignas(64) Table {
  std::array<uint16_t, 32> values;
};

struct Tables {
  std::array<Table, 16> int4;  // q - zero, for each zero point
  Table small;                 // the subnormal numbers of e4m3, by their mantissa
  Table upper;                 // where the upper halves of two vectors of floats are

  Tables() {
    for (size_t n = 0; n < 32; ++n) {
      const float q = static_cast<float>(n % 16);
      for (size_t zero = 0; zero < int4.size(); ++zero) int4[zero].values[n] = to_bf16(q - static_cast<float>(zero));
      small.values[n] = to_bf16(q * 0x1p-9f);
      upper.values[n] = static_cast<uint16_t>(2 * n + 1);
    }
  }
};

const Tables& tables() {
  static const Tables made;
  return made;
}

QWEN2VL_AVX512 inline __m512i load_words(const uint8_t* from) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

QWEN2VL_AVX512 inline __m512i look_up(const Table& table, __m512i words) {
  return _mm512_permutexvar_epi16(words, _mm512_load_si512(table.values.data()));
}

// The upper half of a float that is a whole number below 256 is all of it.
QWEN2VL_AVX512 inline __m512i int8(const uint8_t* from, __m512i zero, const Table& upper) {
  __m512i halves[2];
  for (int n = 0; n < 2; ++n) {
    const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * n)));
    halves[n] = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(q, zero)));
  }
  return _mm512_permutex2var_epi16(halves[0], _mm512_load_si512(upper.values.data()), halves[1]);
}

// The exponent's bias is 7 and not 127, there are no infinities, and 0x7f is no number.
QWEN2VL_AVX512 inline __m512i fp8(__m512i bytes, const Table& small) {
  const __m512i magnitude = _mm512_and_si512(bytes, _mm512_set1_epi16(0x7f));
  const __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
  const __mmask32 no_number = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
  __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  value = _mm512_mask_mov_epi16(value, subnormal, look_up(small, magnitude));
  value = _mm512_mask_mov_epi16(value, no_number, _mm512_set1_epi16(0x7fc0));
  const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(bytes, 8), _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
  return _mm512_or_si512(value, sign);
}

// Scales of groups begin to begin + count of an output.
QWEN2VL_AVX512 inline void take_scales(const QuantWeight& p, int64_t output, int64_t begin, int64_t count,
                                       float* scales) {
  const int64_t at = output / p.block_outputs * p.scales_stride + begin;
  if (p.scale_type == ScaleType::kFloat32) {
    std::memcpy(scales, static_cast<const float*>(p.scales) + at, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(p.scales) + at;
  for (int64_t g = 0; g < count; g += 16) {
    const __mmask16 held = count - g < 16 ? static_cast<__mmask16>((1u << (count - g)) - 1) : 0xffff;
    const __m256i halves = _mm256_maskz_loadu_epi16(held, from + g);
    const __m512 wide = p.scale_type == ScaleType::kFloat16
                            ? _mm512_cvtph_ps(halves)
                            : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    _mm512_mask_storeu_ps(scales + g, held, wide);
  }
}

template <Quantised KIND>
inline int zero_of(const QuantWeight& p, int64_t output, int64_t group) {
  if (KIND == Quantised::kFp8) return 0;
  if (p.zeros == nullptr) return KIND == Quantised::kInt4 ? 8 : 128;
  const uint8_t* zeros = p.zeros + output * p.zeros_stride;
  return KIND == Quantised::kInt4 ? (zeros[group / 2] >> (group % 2 * 4)) & 15 : zeros[group];
}

template <Quantised KIND, int M, int N>
QWEN2VL_AVX512 inline void block(const QuantLinear& p, int64_t row, int64_t output) {
  constexpr int64_t kStep = step_of(KIND);
  const QuantWeight& q = p.weight;
  const Tables& all = tables();
  const uint16_t* x = p.halves + row * q.width;
  const int64_t groups = (q.width + q.block_width - 1) / q.block_width;
  __m512 sums[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  }
  float scales[N][kGroups];
  for (int64_t g = 0; g < groups; ++g) {
    if (g % kGroups == 0) {
      for (int n = 0; n < N; ++n) take_scales(q, output + n, g, std::min(kGroups, groups - g), scales[n]);
    }
    __m512 low[M][N], high[M][N];
    int zero[N];
    for (int n = 0; n < N; ++n) {
      zero[n] = zero_of<KIND>(q, output + n, g);
      for (int m = 0; m < M; ++m) low[m][n] = high[m][n] = _mm512_setzero_ps();
    }
    const int64_t begin = g * q.block_width, end = std::min(begin + q.block_width, q.width);
    for (int64_t k = begin; k < end; k += kStep) {
      __m512i first[N], second[N];
      for (int n = 0; n < N; ++n) {
        const uint8_t* at = q.w + (output + n) * q.w_stride + k * 32 / kStep;
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        if constexpr (KIND == Quantised::kFp8) {
          first[n] = fp8(load_words(at), all.small);
        } else if constexpr (KIND == Quantised::kInt8) {
          first[n] = int8(at, _mm512_set1_epi32(zero[n]), all.upper);
        } else {
          const __m512i words = load_words(at);
          const Table& table = all.int4[static_cast<size_t>(zero[n])];
          first[n] = look_up(table, words);
          second[n] = look_up(table, _mm512_srli_epi16(words, 4));
        }
      }
      for (int m = 0; m < M; ++m) {
        const uint16_t* from = x + m * q.width + k;
        const __m512i values = _mm512_loadu_si512(from);
        for (int n = 0; n < N; ++n) low[m][n] = add_pairs(values, first[n], low[m][n]);
        if constexpr (KIND == Quantised::kInt4) {
          const __m512i others = _mm512_loadu_si512(from + 32);
          for (int n = 0; n < N; ++n) high[m][n] = add_pairs(others, second[n], high[m][n]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        const __m512 both = KIND == Quantised::kInt4 ? _mm512_add_ps(low[m][n], high[m][n]) : low[m][n];
        sums[m][n] = _mm512_fmadd_ps(both, _mm512_set1_ps(scales[n][g % kGroups]), sums[m][n]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) put(p, row + m, output + n, _mm512_reduce_add_ps(sums[m][n]));
  }
}

template <Quantised KIND, int N>
QWEN2VL_AVX512 inline void rows_of(const QuantLinear& p, int64_t output) {
  for (int64_t m = 0; m < p.rows; m += 4) {
    switch (p.rows - m) {
      case 1:
        block<KIND, 1, N>(p, m, output);
        break;
      case 2:
        block<KIND, 2, N>(p, m, output);
        break;
      case 3:
        block<KIND, 3, N>(p, m, output);
        break;
      default:
        block<KIND, 4, N>(p, m, output);
    }
  }
}

template <Quantised KIND>
QWEN2VL_AVX512 inline void outputs_of(const QuantLinear& p, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + kOutputs <= end; n += kOutputs) rows_of<KIND, kOutputs>(p, n);
  for (; n < end; ++n) rows_of<KIND, 1>(p, n);
}

}  // namespace

// Of 64 columns of 4 bits, the lower halves of the bytes are columns 0 to 15 and 32 to 47.
bool arrange_avx512(const QuantWeight& p, const uint16_t* row, uint16_t* arranged) {
  if (!fits(p)) return false;
  if (p.kind != Quantised::kInt4) {
    std::memcpy(arranged, row, static_cast<size_t>(p.width) * sizeof(uint16_t));
    return true;
  }
  constexpr size_t kBytes = 16 * sizeof(uint16_t);
  for (int64_t k = 0; k < p.width; k += 64) {
    std::memcpy(arranged + k, row + k, kBytes);
    std::memcpy(arranged + k + 16, row + k + 32, kBytes);
    std::memcpy(arranged + k + 32, row + k + 16, kBytes);
    std::memcpy(arranged + k + 48, row + k + 48, kBytes);
  }
  return true;
}

QWEN2VL_AVX512 void quant_linear_avx512(const QuantLinear& p, int64_t begin, int64_t end) {
  switch (p.weight.kind) {
    case Quantised::kInt4:
      return outputs_of<Quantised::kInt4>(p, begin, end);
    case Quantised::kInt8:
      return outputs_of<Quantised::kInt8>(p, begin, end);
    case Quantised::kFp8:
      return outputs_of<Quantised::kFp8>(p, begin, end);
  }
}

}  // namespace qwen2vl

#endif
