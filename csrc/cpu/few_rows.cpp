#include "few_rows.h"

#include <algorithm>

namespace qwen2vl {
namespace {

// Bytes of weights in a piece of work: small, so that threads end together, and long enough to be worth taking.
constexpr int64_t kPieceBytes = 64 << 10;
// Outputs of a piece are a multiple of this, so that pieces hold whole blocks of every kernel.
constexpr int64_t kOutputs = 8;

constexpr int kLanes = 16;

void portable(const FewRows& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const uint16_t* w = p.w + n * p.w_stride;
    for (int64_t m = 0; m < p.rows; ++m) {
      const uint16_t* x = p.x + m * p.x_stride;
      float sums[kLanes] = {};
      int64_t k = 0;
      for (; k + kLanes <= p.width; k += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += from_bf16(x[k + lane]) * from_bf16(w[k + lane]);
      }
      for (int lane = 0; k < p.width; ++k, ++lane) sums[lane] += from_bf16(x[k]) * from_bf16(w[k]);
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
      }
      store(p, m, n, sums[0]);
    }
  }
}

}  // namespace

const FewRowsKernel kPortableFewRows{"portable", portable};

const std::vector<FewRowsKernel>& few_rows_kernels() {
  static const std::vector<FewRowsKernel> kernels = [] {
    std::vector<FewRowsKernel> usable;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      usable.push_back(kAvx512FewRows);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) usable.push_back(kAvx2FewRows);
#endif
    usable.push_back(kPortableFewRows);
    return usable;
  }();
  return kernels;
}

int64_t outputs_of_a_piece(const FewRows& p) {
  return std::max(kPieceBytes / (2 * std::max<int64_t>(p.width, 1)) / kOutputs, int64_t{1}) * kOutputs;
}

void few_rows(const FewRows* products, size_t count, int64_t threads, size_t kernel) {
  const auto outputs = few_rows_kernels()[kernel].outputs;
  int64_t pieces = 0;
  for (size_t n = 0; n < count; ++n) pieces += pieces_of_outputs(products[n]);
  run_pieces(threads, pieces, [&](int64_t piece) {
    const FewRows* p = products;
    for (int64_t here; piece >= (here = pieces_of_outputs(*p)); piece -= here) ++p;
    const int64_t each = outputs_of_a_piece(*p), begin = piece * each;
    outputs(*p, begin, std::min(begin + each, p->outputs));
  });
}

}  // namespace qwen2vl
