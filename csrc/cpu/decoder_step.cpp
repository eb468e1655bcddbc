// One body in the compiler's vectors of sixteen, built for each instruction set, as in quant_linear.cpp.
#include "decoder_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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

constexpr int64_t kSums = 16;  // of squares, side by side
// Keys of a split, whatever the threads, so that a result does not depend on these. A split's scores stay in the first
// cache.
constexpr int64_t kSplit = 512;
// How far ahead of the scores keys are asked for, and the elements of a line of the caches.
constexpr int64_t kKeysAhead = 16, kLine = 32;
// Bytes of keys and values for which it is worth waking another thread.
constexpr int64_t kThreadBytes = 192 << 10;

// Vectors as wide as the registers: compilers cut a wider one through memory. `kMost` query heads and two vectors of
// columns, or as many sums of scores, fit the registers there are.
namespace portable {
#define QWEN2VL_TARGET
constexpr int64_t kLanes = 4;
constexpr int kMost = 6;
#include "decoder_step_vectors.h"

QWEN2VL_TARGET inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& sum) { return sum + a * b; }

QWEN2VL_TARGET inline float total(const Floats& sums) { return (sums[0] + sums[2]) + (sums[1] + sums[3]); }

#include "decoder_step_loops.h"
#undef QWEN2VL_TARGET
}  // namespace portable

#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
#define QWEN2VL_TARGET __attribute__((target("avx2,fma")))
constexpr int64_t kLanes = 8;
constexpr int kMost = 6;
#include "decoder_step_vectors.h"

QWEN2VL_TARGET inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& sum) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}

QWEN2VL_TARGET inline float total(const Floats& sums) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)sums), _mm256_extractf128_ps((__m256)sums, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

#include "decoder_step_loops.h"
#undef QWEN2VL_TARGET
}  // namespace avx2

namespace avx512 {
#define QWEN2VL_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))
constexpr int64_t kLanes = 16;
constexpr int kMost = 8;
#include "decoder_step_vectors.h"

QWEN2VL_TARGET inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& sum) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}

QWEN2VL_TARGET inline float total(const Floats& sums) { return _mm512_reduce_add_ps((__m512)sums); }

#include "decoder_step_loops.h"
#undef QWEN2VL_TARGET
}  // namespace avx512
#endif

// What room is for: a piece of work needs its own beside that of the call, whose thread takes pieces too.
enum class For { kCall, kPiece };

// Room that a thread keeps between calls.
template <class T, For>
T* scratch(int64_t count) {
  thread_local std::vector<T> room;
  if (room.size() < static_cast<size_t>(count)) room.resize(static_cast<size_t>(count));
  return room.data();
}

// Statistics and the product with the weight in float32, rounded once.
void normed(const RmsNorm& p, int64_t rows, int64_t width, uint16_t* y) {
  for (int64_t row = 0; row < rows; ++row, y += width) {
    const uint16_t* x = p.x + row * p.x_stride;
    float squares[kSums] = {};
    int64_t k = 0;
    for (; k + kSums <= width; k += kSums) {
      for (int64_t lane = 0; lane < kSums; ++lane) squares[lane] += from_bf16(x[k + lane]) * from_bf16(x[k + lane]);
    }
    for (int64_t lane = 0; k < width; ++k, ++lane) squares[lane] += from_bf16(x[k]) * from_bf16(x[k]);
    for (int64_t half = kSums / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) squares[lane] += squares[lane + half];
    }
    const float inverse = 1.0f / std::sqrt(squares[0] / static_cast<float>(width) + p.eps);
    for (k = 0; k < width; ++k) y[k] = to_bf16(from_bf16(x[k]) * inverse * from_bf16(p.weight[k]));
  }
}

double position_of(const DecodeAttention& p, int64_t row) {
  const int64_t at = row * p.positions_stride;
  return static_cast<double>(p.positions_bytes == 4 ? static_cast<const int32_t*>(p.positions)[at]
                                                    : static_cast<const int64_t*>(p.positions)[at]);
}

// The pair (j, j + columns / 2) by its angle, rounded to bf16.
void rotate(const uint16_t* x, const float* cosines, const float* sines, int64_t half, uint16_t* y) {
  for (int64_t j = 0; j < half; ++j) {
    const float a = from_bf16(x[j]), b = from_bf16(x[j + half]);
    y[j] = to_bf16(a * cosines[j] - b * sines[j]);
    y[j + half] = to_bf16(b * cosines[j] + a * sines[j]);
  }
}

bool lives(const DecodeAttention& p, int64_t row) {
  const int32_t length = p.lengths[row * p.lengths_stride];
  return length >= 1 && length <= p.capacity;
}

// The new keys and values into the cache; the queries, rotated and scaled, into `queries`.
void rotate_and_store(const DecodeAttention& p, float* queries) {
  const int64_t half = p.columns / 2;
  std::vector<float> angles(static_cast<size_t>(2 * half));
  std::vector<uint16_t> turned(static_cast<size_t>(p.columns));
  float *cosines = angles.data(), *sines = cosines + half;
  for (int64_t row = 0; row < p.rows; ++row) {
    if (!lives(p, row)) continue;
    const float position = static_cast<float>(position_of(p, row));
    for (int64_t j = 0; j < half; ++j) {
      cosines[j] = std::cos(position * p.inv_freq[j]);
      sines[j] = std::sin(position * p.inv_freq[j]);
    }
    const int64_t slot = p.lengths[row * p.lengths_stride] - 1;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      rotate(p.k + row * p.k_strides[0] + head * p.k_strides[1], cosines, sines, half,
             p.k_cache + row * p.k_cache_strides[0] + slot * p.k_cache_strides[1] + head * p.k_cache_strides[2]);
      std::memcpy(p.v_cache + row * p.v_cache_strides[0] + slot * p.v_cache_strides[1] + head * p.v_cache_strides[2],
                  p.v + row * p.v_strides[0] + head * p.v_strides[1],
                  static_cast<size_t>(p.columns) * sizeof(uint16_t));
    }
    for (int64_t head = 0; head < p.heads; ++head) {
      rotate(p.q + row * p.q_strides[0] + head * p.q_strides[1], cosines, sines, half, turned.data());
      float* to = queries + (row * p.heads + head) * p.columns;
      for (int64_t c = 0; c < p.columns; ++c) to[c] = from_bf16(turned[static_cast<size_t>(c)]) * p.scale;
    }
  }
}

struct Piece {
  int64_t row, kv_head, begin, end;
};

}  // namespace

const std::vector<StepKernel>& step_kernels() {
  static const std::vector<StepKernel> kernels = [] {
    std::vector<StepKernel> usable;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      usable.push_back({"avx512", avx512::attend, avx512::swiglu});
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      usable.push_back({"avx2", avx2::attend, avx2::swiglu});
    }
#endif
    usable.push_back({"portable", portable::attend, portable::swiglu});
    return usable;
  }();
  return kernels;
}

void rms_norm_linear(const RmsNorm& norm, std::array<FewRows, 3> products, int64_t threads, size_t kernel) {
  const int64_t rows = products[0].rows, width = products[0].width;
  uint16_t* x = scratch<uint16_t, For::kCall>(rows * width);
  normed(norm, rows, width, x);
  for (FewRows& product : products) {
    product.x = x;
    product.x_stride = width;
  }
  few_rows(products.data(), products.size(), threads, kernel);
}

void rms_norm_swiglu(const RmsNorm& norm, FewRows gate, FewRows up, int64_t threads, size_t kernel,
                     size_t step_kernel) {
  uint16_t* x = scratch<uint16_t, For::kCall>(gate.rows * gate.width);
  normed(norm, gate.rows, gate.width, x);
  gate.x = up.x = x;
  gate.x_stride = up.x_stride = gate.width;
  const auto outputs = few_rows_kernels()[kernel].outputs;
  const auto swiglu = step_kernels()[step_kernel].swiglu;
  in_pieces_of_outputs(gate, threads, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    uint16_t* held = scratch<uint16_t, For::kPiece>(2 * gate.rows * count);
    FewRows parts[2] = {gate, up};
    for (int n = 0; n < 2; ++n) {
      parts[n].y = held + n * gate.rows * count;
      parts[n].y_stride = count;
      parts[n].w += begin * parts[n].w_stride;
      parts[n].outputs = count;
      outputs(parts[n], 0, count);
    }
    for (int64_t row = 0; row < gate.rows; ++row) {
      swiglu(parts[0].y + row * count, parts[1].y + row * count, gate.y + row * gate.y_stride + begin, count);
    }
  });
}

void linear_add(FewRows product, int64_t threads, size_t kernel) {
  const auto outputs = few_rows_kernels()[kernel].outputs;
  in_pieces_of_outputs(product, threads, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    FewRows part = product;
    part.y = scratch<uint16_t, For::kPiece>(product.rows * count);
    part.y_stride = count;
    part.w += begin * part.w_stride;
    part.outputs = count;
    outputs(part, 0, count);
    for (int64_t row = 0; row < product.rows; ++row) {
      uint16_t* y = product.y + row * product.y_stride + begin;
      for (int64_t n = 0; n < count; ++n) y[n] = to_bf16(from_bf16(y[n]) + from_bf16(part.y[row * count + n]));
    }
  });
}

void decode_attention(const DecodeAttention& p, int64_t threads, size_t kernel) {
  const auto attend = step_kernels()[kernel].attend;
  const int64_t group = p.heads / p.kv_heads, each = group * (p.columns + 2);
  std::vector<Piece> pieces;
  int64_t keys = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    if (!lives(p, row)) {
      std::memset(p.out + row * p.heads * p.columns, 0, static_cast<size_t>(p.heads * p.columns) * sizeof(uint16_t));
      continue;
    }
    const int64_t length = p.lengths[row * p.lengths_stride];
    keys += length;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      for (int64_t begin = 0; begin < length; begin += kSplit) {
        pieces.push_back({row, head, begin, std::min(begin + kSplit, length)});
      }
    }
  }
  const int64_t count = static_cast<int64_t>(pieces.size()), queries = p.rows * p.heads * p.columns;
  float* held = scratch<float, For::kCall>(queries + count * each);
  float* parts = held + queries;
  rotate_and_store(p, held);
  const int64_t bytes = 2 * keys * p.kv_heads * p.columns * static_cast<int64_t>(sizeof(uint16_t));
  run_pieces(std::min(threads, std::max<int64_t>(bytes / kThreadBytes, 1)), count, [&](int64_t n) {
    float* scores = scratch<float, For::kPiece>(group * kSplit);
    const Piece& piece = pieces[static_cast<size_t>(n)];
    float* part = parts + n * each;
    attend({held + (piece.row * p.heads + piece.kv_head * group) * p.columns,
            p.k_cache + piece.row * p.k_cache_strides[0] + piece.begin * p.k_cache_strides[1] +
                piece.kv_head * p.k_cache_strides[2],
            p.v_cache + piece.row * p.v_cache_strides[0] + piece.begin * p.v_cache_strides[1] +
                piece.kv_head * p.v_cache_strides[2],
            p.k_cache_strides[1], p.v_cache_strides[1], piece.end - piece.begin, group, p.columns, scores, part,
            part + group * p.columns, part + group * p.columns + group});
  });
  // The splits of a head, in their order.
  std::vector<float> sums(static_cast<size_t>(p.columns));
  for (int64_t first = 0, last; first < count; first = last) {
    const Piece& piece = pieces[static_cast<size_t>(first)];
    for (last = first + 1; last < count && pieces[static_cast<size_t>(last)].begin > 0;) ++last;
    for (int64_t head = 0; head < group; ++head) {
      const float *largest = parts + group * p.columns + head, *total = largest + group;
      float most = largest[first * each];
      for (int64_t n = first + 1; n < last; ++n) most = std::max(most, largest[n * each]);
      std::fill(sums.begin(), sums.end(), 0.0f);
      float weight = 0;
      for (int64_t n = first; n < last; ++n) {
        if (largest[n * each] == -std::numeric_limits<float>::infinity() && most > largest[n * each]) continue;
        const float scale = std::exp(largest[n * each] - most);
        const float* part = parts + n * each + head * p.columns;
        for (int64_t c = 0; c < p.columns; ++c) sums[static_cast<size_t>(c)] += scale * part[c];
        weight += scale * total[n * each];
      }
      uint16_t* out = p.out + (piece.row * p.heads + piece.kv_head * group + head) * p.columns;
      for (int64_t c = 0; c < p.columns; ++c) out[c] = to_bf16(sums[static_cast<size_t>(c)] / weight);
    }
  }
}

}  // namespace qwen2vl
