// The passes for x86: AVX-512 with VNNI, and AVX2. Function attributes choose the instructions, so that the file can be
// compiled for any x86-64 and nothing of it leaks into code that runs on older processors.
#include "resample.h"

#if defined(__x86_64__) && defined(__GNUC__)

// GCC 12's own headers leave a value undefined on purpose and then warn about it.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include "resample_loops.h"

#define QWEN2VL_AVX2 __attribute__((target("avx2")))
#define QWEN2VL_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vnni")))

namespace qwen2vl {
namespace {

constexpr int64_t kQuadBytes = 12;  // four RGB pixels

// ---- AVX-512 with VNNI: one multiply-add instruction takes four taps of 16 sums, once for each digit of the weights.

// Byte 4c + t of a 128-bit lane is channel c of tap t; the fourth sum stays empty.
QWEN2VL_AVX512 inline __m512i by_channel() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
}

// d0 has kHalfWeight in it already.
QWEN2VL_AVX512 inline __m512i combine(__m512i d0, __m512i d1, __m512i d2) {
  const __m512i high = _mm512_add_epi32(d1, _mm512_slli_epi32(d2, 8));
  return _mm512_srai_epi32(_mm512_add_epi32(d0, _mm512_slli_epi32(high, 8)), kWeightBits);
}

// The sums of one output pixel for four rows, a row to a lane: red, green, blue, nothing.
QWEN2VL_AVX512 inline __m512i four_rows(const AxisTaps& taps, int64_t i, const uint8_t* const* rows) {
  const auto at = static_cast<size_t>(i);
  const int64_t offset = 3 * static_cast<int64_t>(taps.quad_first[at]);
  const int32_t* digits = taps.digits.data() + 3 * taps.quad_begin[at];
  const uint8_t *a = rows[0] + offset, *b = rows[1] + offset, *c = rows[2] + offset, *d = rows[3] + offset;
  __m512i d0 = _mm512_set1_epi32(kHalfWeight), d1 = _mm512_setzero_si512(), d2 = d1;
  constexpr __mmask16 kRead = (1 << kQuadBytes) - 1;
  for (int64_t quad = taps.quad_begin[at]; quad < taps.quad_begin[at + 1]; ++quad, digits += 3) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_maskz_loadu_epi8(kRead, a)),
                                                _mm_maskz_loadu_epi8(kRead, b), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_maskz_loadu_epi8(kRead, c)),
                                                 _mm_maskz_loadu_epi8(kRead, d), 1);
    const __m512i pixels = _mm512_shuffle_epi8(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), by_channel());
    d0 = _mm512_dpbusd_epi32(d0, pixels, _mm512_set1_epi32(digits[0]));
    d1 = _mm512_dpbusd_epi32(d1, pixels, _mm512_set1_epi32(digits[1]));
    d2 = _mm512_dpbusd_epi32(d2, pixels, _mm512_set1_epi32(digits[2]));
    a += kQuadBytes, b += kQuadBytes, c += kQuadBytes, d += kQuadBytes;
  }
  return combine(d0, d1, d2);
}

// Four output pixels of four rows as bytes: dwords of four reds, four greens, four blues in each lane.
QWEN2VL_AVX512 inline __m512i four_pixels(const AxisTaps& taps, int64_t i, const uint8_t* const* rows) {
  const __m512i ab = _mm512_packs_epi32(four_rows(taps, i, rows), four_rows(taps, i + 1, rows));
  const __m512i cd = _mm512_packs_epi32(four_rows(taps, i + 2, rows), four_rows(taps, i + 3, rows));
  return _mm512_shuffle_epi8(_mm512_packus_epi16(ab, cd), _mm512_broadcast_i32x4(_mm_setr_epi8(
                                                              0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

template <int lane>
QWEN2VL_AVX512 inline void store_lane(uint8_t* out, int64_t plane_stride, __m512i red, __m512i green, __m512i blue) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_extracti32x4_epi32(red, lane));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + plane_stride), _mm512_extracti32x4_epi32(green, lane));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * plane_stride), _mm512_extracti32x4_epi32(blue, lane));
}

QWEN2VL_AVX512 void horizontal_avx512(const AxisTaps& taps, const uint8_t* const* rows, uint8_t* const* out,
                                      int64_t plane_stride) {
  // Rows without room for a single quad are not worth a vector.
  const int64_t vectors = taps.in < 4 * taps.most_quads ? 0 : taps.out / 16 * 16;
  for (int64_t i = 0; i < vectors; i += 16) {
    const __m512i p0 = four_pixels(taps, i, rows), p1 = four_pixels(taps, i + 4, rows);
    const __m512i p2 = four_pixels(taps, i + 8, rows), p3 = four_pixels(taps, i + 12, rows);
    const __m512i rg01 = _mm512_unpacklo_epi32(p0, p1), rg23 = _mm512_unpacklo_epi32(p2, p3);
    const __m512i b01 = _mm512_unpackhi_epi32(p0, p1), b23 = _mm512_unpackhi_epi32(p2, p3);
    const __m512i red = _mm512_unpacklo_epi64(rg01, rg23), green = _mm512_unpackhi_epi64(rg01, rg23);
    const __m512i blue = _mm512_unpacklo_epi64(b01, b23);
    store_lane<0>(out[0] + i, plane_stride, red, green, blue);
    store_lane<1>(out[1] + i, plane_stride, red, green, blue);
    store_lane<2>(out[2] + i, plane_stride, red, green, blue);
    store_lane<3>(out[3] + i, plane_stride, red, green, blue);
  }
  for (int r = 0; r < kRowGroup; ++r) horizontal_row(taps, rows[r], vectors, out[r], plane_stride);
}

QWEN2VL_AVX512 void split_avx512(const uint8_t* row, int64_t width, uint8_t* out, int64_t plane_stride) {
  split_row(row, width, out, plane_stride);
}

// Interleaving four rows by bytes puts the four taps of every column side by side; packing undoes its order.
QWEN2VL_AVX512 void vertical_avx512(const AxisTaps& taps, int64_t i, const uint8_t* const* rows, uint8_t* out,
                                    int64_t bytes) {
  const auto at = static_cast<size_t>(i);
  const int64_t first_quad = taps.quad_begin[at], quads = taps.quad_begin[at + 1] - first_quad;
  const int32_t shift = taps.quad_first[at] - taps.first[at];
  const int64_t vectors = bytes / 64 * 64;
  for (int64_t start = 0; start < vectors; start += 64) {
    __m512i d[4][3];
    for (auto& part : d) part[0] = _mm512_set1_epi32(kHalfWeight), part[1] = part[2] = _mm512_setzero_si512();
    for (int64_t quad = 0; quad < quads; ++quad) {
      __m512i row[4];
      for (int lane = 0; lane < 4; ++lane) {
        const int64_t tap = shift + 4 * quad + lane;  // beside the window the weight is zero and any row will do
        row[lane] = _mm512_loadu_si512(rows[tap >= 0 && tap < taps.count[at] ? tap : 0] + start);
      }
      const __m512i ab_low = _mm512_unpacklo_epi8(row[0], row[1]), ab_high = _mm512_unpackhi_epi8(row[0], row[1]);
      const __m512i cd_low = _mm512_unpacklo_epi8(row[2], row[3]), cd_high = _mm512_unpackhi_epi8(row[2], row[3]);
      const __m512i columns[4] = {_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
                                  _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)};
      const int32_t* const digits = taps.digits.data() + 3 * (first_quad + quad);
      for (int part = 0; part < 4; ++part) {
        for (int digit = 0; digit < 3; ++digit) {
          d[part][digit] = _mm512_dpbusd_epi32(d[part][digit], columns[part], _mm512_set1_epi32(digits[digit]));
        }
      }
    }
    const __m512i low = _mm512_packs_epi32(combine(d[0][0], d[0][1], d[0][2]), combine(d[1][0], d[1][1], d[1][2]));
    const __m512i high = _mm512_packs_epi32(combine(d[2][0], d[2][1], d[2][2]), combine(d[3][0], d[3][1], d[3][2]));
    _mm512_storeu_si512(out + start, _mm512_packus_epi16(low, high));
  }
  if (vectors < bytes) vertical_rows(taps, i, rows, vectors, out, bytes);
}

// ---- AVX2: pairs of taps in 16 bits, the weights in a part of 12 bits and the rest.

// Words of taps 0 and 1 (then 2 and 3) of each channel.
QWEN2VL_AVX2 inline __m256i first_pair() {
  return _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
}
QWEN2VL_AVX2 inline __m256i second_pair() {
  return _mm256_broadcastsi128_si256(_mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
}

QWEN2VL_AVX2 inline __m128i load_quad(const uint8_t* pixels) {
  int32_t last = 0;
  __builtin_memcpy(&last, pixels + 8, 4);
  return _mm_insert_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pixels)), last, 2);
}

QWEN2VL_AVX2 inline __m256i two_rows(const AxisTaps& taps, int64_t i, const uint8_t* a, const uint8_t* b) {
  const auto at = static_cast<size_t>(i);
  const int64_t offset = 3 * static_cast<int64_t>(taps.quad_first[at]);
  a += offset, b += offset;
  const auto* weights = reinterpret_cast<const int32_t*>(taps.halves.data() + 8 * taps.quad_begin[at]);
  __m256i low = _mm256_set1_epi32(kHalfWeight), high = _mm256_setzero_si256();
  for (int64_t quad = taps.quad_begin[at]; quad < taps.quad_begin[at + 1]; ++quad, weights += 4) {
    const __m256i pixels = _mm256_inserti128_si256(_mm256_castsi128_si256(load_quad(a)), load_quad(b), 1);
    const __m256i first = _mm256_shuffle_epi8(pixels, first_pair());
    const __m256i second = _mm256_shuffle_epi8(pixels, second_pair());
    low = _mm256_add_epi32(low, _mm256_madd_epi16(first, _mm256_set1_epi32(weights[0])));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(first, _mm256_set1_epi32(weights[1])));
    low = _mm256_add_epi32(low, _mm256_madd_epi16(second, _mm256_set1_epi32(weights[2])));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(second, _mm256_set1_epi32(weights[3])));
    a += kQuadBytes, b += kQuadBytes;
  }
  return _mm256_srai_epi32(_mm256_add_epi32(low, _mm256_slli_epi32(high, 12)), kWeightBits);
}

QWEN2VL_AVX2 inline __m256i four_pixels(const AxisTaps& taps, int64_t i, const uint8_t* a, const uint8_t* b) {
  const __m256i low = _mm256_packs_epi32(two_rows(taps, i, a, b), two_rows(taps, i + 1, a, b));
  const __m256i high = _mm256_packs_epi32(two_rows(taps, i + 2, a, b), two_rows(taps, i + 3, a, b));
  return _mm256_shuffle_epi8(
      _mm256_packus_epi16(low, high),
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

QWEN2VL_AVX2 inline void store_pair(uint8_t* a, uint8_t* b, __m256i bytes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(a), _mm256_castsi256_si128(bytes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(b), _mm256_extracti128_si256(bytes, 1));
}

QWEN2VL_AVX2 void horizontal_avx2(const AxisTaps& taps, const uint8_t* const* rows, uint8_t* const* out,
                                  int64_t plane_stride) {
  const int64_t vectors = taps.in < 4 * taps.most_quads ? 0 : taps.out / 16 * 16;
  for (int r = 0; r < kRowGroup; r += 2) {
    for (int64_t i = 0; i < vectors; i += 16) {
      const __m256i p0 = four_pixels(taps, i, rows[r], rows[r + 1]),
                    p1 = four_pixels(taps, i + 4, rows[r], rows[r + 1]);
      const __m256i p2 = four_pixels(taps, i + 8, rows[r], rows[r + 1]),
                    p3 = four_pixels(taps, i + 12, rows[r], rows[r + 1]);
      const __m256i rg01 = _mm256_unpacklo_epi32(p0, p1), rg23 = _mm256_unpacklo_epi32(p2, p3);
      const __m256i b01 = _mm256_unpackhi_epi32(p0, p1), b23 = _mm256_unpackhi_epi32(p2, p3);
      uint8_t *a = out[r] + i, *b = out[r + 1] + i;
      store_pair(a, b, _mm256_unpacklo_epi64(rg01, rg23));
      store_pair(a + plane_stride, b + plane_stride, _mm256_unpackhi_epi64(rg01, rg23));
      store_pair(a + 2 * plane_stride, b + 2 * plane_stride, _mm256_unpacklo_epi64(b01, b23));
    }
  }
  for (int r = 0; r < kRowGroup; ++r) horizontal_row(taps, rows[r], vectors, out[r], plane_stride);
}

QWEN2VL_AVX2 void split_avx2(const uint8_t* row, int64_t width, uint8_t* out, int64_t plane_stride) {
  split_row(row, width, out, plane_stride);
}

QWEN2VL_AVX2 void vertical_avx2(const AxisTaps& taps, int64_t i, const uint8_t* const* rows, uint8_t* out,
                                int64_t bytes) {
  vertical_rows(taps, i, rows, 0, out, bytes);
}

}  // namespace

const RowKernels kAvx512Rows{"avx512-vnni", horizontal_avx512, split_avx512, vertical_avx512};
const RowKernels kAvx2Rows{"avx2", horizontal_avx2, split_avx2, vertical_avx2};

}  // namespace qwen2vl

#endif
