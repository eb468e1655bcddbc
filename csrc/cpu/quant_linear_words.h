// What quant_linear_loops.h is made of, in the compiler's vectors; included as that file is. With QWEN2VL_SIXTEEN_AVX2
// bytes are widened and products added by AVX2's own words, which the compiler does not find.

#if defined(QWEN2VL_SIXTEEN_AVX2)
QWEN2VL_TARGET inline Ints sixteen(const uint8_t* bytes) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m256i halves[2] = {_mm256_cvtepu8_epi32(packed), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(packed, packed))};
  Ints wide;
  std::memcpy(&wide, halves, sizeof wide);
  return wide;
}

QWEN2VL_TARGET inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& sum) {
  __m256 parts[3][2];
  std::memcpy(parts[0], &a, sizeof a);
  std::memcpy(parts[1], &b, sizeof b);
  std::memcpy(parts[2], &sum, sizeof sum);
  for (int half = 0; half < 2; ++half) {
    parts[2][half] = _mm256_fmadd_ps(parts[0][half], parts[1][half], parts[2][half]);
  }
  Floats result;
  std::memcpy(&result, parts[2], sizeof result);
  return result;
}
#else
QWEN2VL_TARGET inline Ints sixteen(const uint8_t* bytes) {
  Ints wide;
  for (int64_t lane = 0; lane < kLanes; ++lane) wide[lane] = bytes[lane];
  return wide;
}

QWEN2VL_TARGET inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& sum) { return sum + a * b; }
#endif

// The first of the sixteen values is that of the integer 0.
QWEN2VL_TARGET inline void int4(const uint8_t* bytes, const Floats& values, Floats* low, Floats* high) {
  const Ints first = sixteen(bytes);
  *low = __builtin_convertvector(first & 15, Floats) + values[0];
  *high = __builtin_convertvector(first >> 4, Floats) + values[0];
}

// e4m3, 2^8 too small: the exponent's bias is 7, there are no infinities, and 0x7f is no number. Numbers below 2^-6 are
// made of integers: as float32 they would be subnormal, which processors treat slowly or, where told so, as zeros.
QWEN2VL_TARGET inline Floats sixteen_fp8(const uint8_t* from) {
  const Ints bytes = sixteen(from);
  const Ints magnitude = bytes & 0x7f;
  const Ints normal = (magnitude << 20) + (112 << 23);
  Ints small;
  const Floats tiny = __builtin_convertvector(magnitude, Floats) * 0x1p-17f;
  std::memcpy(&small, &tiny, sizeof small);
  const Ints below = magnitude < 8, no_number = magnitude == 0x7f;
  Ints bits = (below & small) | (~below & normal);
  bits = bits | (no_number & 0x7fc00000) | ((bytes & 0x80) << 24);
  Floats value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

QWEN2VL_TARGET inline void fp8(const uint8_t* bytes, Floats* low, Floats* high) {
  *low = sixteen_fp8(bytes);
  *high = sixteen_fp8(bytes + kLanes);
}
