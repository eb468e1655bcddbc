// For x86: AVX-512 and AVX2. Function attributes choose the instructions, as in
// resample_x86.cpp.
#include "few_rows.h"

#if defined(__x86_64__) && defined(__GNUC__)

// GCC 12's own headers leave a value undefined on purpose and then warn about it.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <algorithm>

#include "bf16_avx512.h"

#define QWEN2VL_AVX2 __attribute__((target("avx2,fma")))
#define QWEN2VL_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))

namespace qwen2vl {
namespace {

// How far ahead of the products a weight is asked for, in elements: the processor's own prefetching ends at pages, and
// asks for too little at a time. Of 1 to 8 rows of weights at a time and 512 to 12,288 elements ahead, 2 rows and 4,096
// read fastest, for widths of 1,536 and 8,960, on one core and on two of a Xeon with AVX-512.
constexpr int64_t kAhead = 4096;

// ---- AVX-512

// The totals of sixteen vectors, each added up as _mm512_reduce_add_ps does: halves, quarters, and so on. Lane 4 c + l
// is the total of sums[kPlace[c][l]].
constexpr int kPlace[4][4] = {{0, 2, 1, 3}, {8, 10, 9, 11}, {4, 6, 5, 7}, {12, 14, 13, 15}};

QWEN2VL_AVX512 inline __m512 totals512(const __m512 (&sums)[16]) {
  __m512 halves[8], quarters[4], pairs[2];
  for (int n = 0; n < 8; ++n) {
    halves[n] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[n], sums[n + 8], 0x44),
                              _mm512_shuffle_f32x4(sums[n], sums[n + 8], 0xee));
  }
  for (int n = 0; n < 4; ++n) {
    quarters[n] = _mm512_add_ps(_mm512_shuffle_f32x4(halves[n], halves[n + 4], 0x88),
                                _mm512_shuffle_f32x4(halves[n], halves[n + 4], 0xdd));
  }
  for (int n = 0; n < 2; ++n) {
    pairs[n] = _mm512_add_ps(_mm512_shuffle_ps(quarters[n], quarters[n + 2], 0x44),
                             _mm512_shuffle_ps(quarters[n], quarters[n + 2], 0xee));
  }
  return _mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
}

// Up to eight rows of x and two of w, whose sums are as many as hide the latency of a product.
template <int M, int N>
QWEN2VL_AVX512 inline void block512(const FewRows& p, int64_t row, int64_t output) {
  const uint16_t* x = p.x + row * p.x_stride;
  const uint16_t* w = p.w + output * p.w_stride;
  __m512 sums[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  }
  const int64_t whole = p.width / 32 * 32;
  for (int64_t k = 0; k < whole; k += 32) {
    __m512i weights[N];
    for (int n = 0; n < N; ++n) {
      weights[n] = _mm512_loadu_si512(w + n * p.w_stride + k);
      _mm_prefetch(reinterpret_cast<const char*>(w + n * p.w_stride + k + kAhead), _MM_HINT_T0);
    }
    for (int m = 0; m < M; ++m) {
      const __m512i values = _mm512_loadu_si512(x + m * p.x_stride + k);
      for (int n = 0; n < N; ++n) sums[m][n] = add_pairs(values, weights[n], sums[m][n]);
    }
  }
  if (whole < p.width) {
    const __mmask32 held = (1u << (p.width - whole)) - 1;
    for (int m = 0; m < M; ++m) {
      const __m512i values = _mm512_maskz_loadu_epi16(held, x + m * p.x_stride + whole);
      for (int n = 0; n < N; ++n) {
        const __m512i weights = _mm512_maskz_loadu_epi16(held, w + n * p.w_stride + whole);
        sums[m][n] = add_pairs(values, weights, sums[m][n]);
      }
    }
  }
  float found[8][2];
  if constexpr (M * N <= 4) {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) found[m][n] = _mm512_reduce_add_ps(sums[m][n]);
    }
  } else {
    __m512 all[16];
    for (int n = 0; n < 16; ++n) {
      const int m = n / 2;
      all[kPlace[n / 4][n % 4]] = m < M && n % 2 < N ? sums[m][n % 2] : _mm512_setzero_ps();
    }
    _mm512_storeu_ps(&found[0][0], totals512(all));
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) store(p, row + m, output + n, found[m][n]);
  }
}

template <int N>
QWEN2VL_AVX512 inline void rows512(const FewRows& p, int64_t output) {
  for (int64_t m = 0; m < p.rows; m += 8) {
    switch (p.rows - m) {
      case 1:
        block512<1, N>(p, m, output);
        break;
      case 2:
        block512<2, N>(p, m, output);
        break;
      case 3:
        block512<3, N>(p, m, output);
        break;
      case 4:
        block512<4, N>(p, m, output);
        break;
      case 5:
        block512<5, N>(p, m, output);
        break;
      case 6:
        block512<6, N>(p, m, output);
        break;
      case 7:
        block512<7, N>(p, m, output);
        break;
      default:
        block512<8, N>(p, m, output);
    }
  }
}

QWEN2VL_AVX512 void avx512(const FewRows& p, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + 2 <= end; n += 2) rows512<2>(p, n);
  for (; n < end; ++n) rows512<1>(p, n);
}

// ---- AVX2, with the halves of words as in bf16_avx512.h.

QWEN2VL_AVX2 inline __m256 even(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }

QWEN2VL_AVX2 inline __m256 odd(__m256i words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

QWEN2VL_AVX2 inline float total(__m256 sums) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

template <int M, int N>
QWEN2VL_AVX2 inline void block256(const FewRows& p, int64_t row, int64_t output) {
  const uint16_t* x = p.x + row * p.x_stride;
  const uint16_t* w = p.w + output * p.w_stride;
  __m256 low[M][N], high[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) low[m][n] = high[m][n] = _mm256_setzero_ps();
  }
  int64_t k = 0;
  for (; k + 16 <= p.width; k += 16) {
    __m256i values[M];
    for (int m = 0; m < M; ++m) {
      values[m] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + m * p.x_stride + k));
    }
    for (int n = 0; n < N; ++n) {
      const uint16_t* at = w + n * p.w_stride + k;
      const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
      for (int m = 0; m < M; ++m) {
        low[m][n] = _mm256_fmadd_ps(even(values[m]), even(weights), low[m][n]);
        high[m][n] = _mm256_fmadd_ps(odd(values[m]), odd(weights), high[m][n]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float sum = total(_mm256_add_ps(low[m][n], high[m][n]));
      for (int64_t rest = k; rest < p.width; ++rest) {
        sum += from_bf16(x[m * p.x_stride + rest]) * from_bf16(w[n * p.w_stride + rest]);
      }
      store(p, row + m, output + n, sum);
    }
  }
}

template <int M>
QWEN2VL_AVX2 inline void outputs256(const FewRows& p, int64_t row, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + 2 <= end; n += 2) block256<M, 2>(p, row, n);
  for (; n < end; ++n) block256<M, 1>(p, row, n);
}

QWEN2VL_AVX2 void avx2(const FewRows& p, int64_t begin, int64_t end) {
  // A piece of work stays in the caches, so that pairs of rows may each pass over it.
  int64_t m = 0;
  for (; m + 2 <= p.rows; m += 2) outputs256<2>(p, m, begin, end);
  if (m < p.rows) outputs256<1>(p, m, begin, end);
}

}  // namespace

const FewRowsKernel kAvx512FewRows{"avx512", avx512}, kAvx2FewRows{"avx2", avx2};

}  // namespace qwen2vl

#endif
