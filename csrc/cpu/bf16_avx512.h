// Products of bf16 for AVX-512. The halves of a 32-bit word are two bf16, of which each is the upper half of a float32.
// The instruction that multiplies pairs of bf16 takes as long as five additions of products of float32 on a Xeon that
// has it, and takes subnormal numbers for zeros.
#pragma once

#include <immintrin.h>

#define QWEN2VL_BF16_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))

namespace qwen2vl {

QWEN2VL_BF16_AVX512 inline __m512 even512(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }

QWEN2VL_BF16_AVX512 inline __m512 odd512(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The sum and the products of 32 numbers, two in each of its lanes.
QWEN2VL_BF16_AVX512 inline __m512 add_pairs(__m512i a, __m512i b, __m512 sum) {
  return _mm512_fmadd_ps(odd512(a), odd512(b), _mm512_fmadd_ps(even512(a), even512(b), sum));
}

}  // namespace qwen2vl

#undef QWEN2VL_BF16_AVX512
