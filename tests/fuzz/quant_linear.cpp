// Quantised weights of any kind, size and stride, by every instruction set: nothing outside the buffers is touched, the
// values are the same bits by all, and a product is theirs with x within rounding.
#include "cpu/quant_linear.h"

#include <algorithm>
#include <cmath>

#include "driver.h"

namespace {

using fuzz::Buffer;
using qwen2vl::Quantised;
using qwen2vl::QuantLinear;
using qwen2vl::QuantValues;
using qwen2vl::QuantWeight;
using qwen2vl::ScaleType;

int64_t bytes_of(int64_t rows, int64_t stride, int64_t columns) {
  return rows * columns == 0 ? 0 : (rows - 1) * stride + columns;
}

void fill(Buffer& buffer, uint64_t seed) {
  fuzz::XorShift random(seed);
  for (size_t n = 0; n < buffer.size(); ++n) buffer.data()[n] = static_cast<uint8_t>(random());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  QuantWeight q{};
  q.kind = static_cast<Quantised>(bytes.below(3));
  q.scale_type = static_cast<ScaleType>(bytes.below(3));
  q.outputs = bytes.below(40);
  q.width = 32 * bytes.below(9);
  q.block_outputs = q.kind == Quantised::kFp8 ? 1 + bytes.below(q.outputs + 3) : 1;
  q.block_width = bytes.flag() ? 32 * (1 + bytes.below(5)) : q.width + 1;
  const uint64_t seed = bytes.take<uint32_t>();
  const int64_t rows = bytes.below(7), threads = 1 + bytes.below(3);

  const int64_t row = q.kind == Quantised::kInt4 ? q.width / 2 : q.width;
  q.w_stride = row + bytes.below(5);
  Buffer w(bytes_of(q.outputs, q.w_stride, row));
  fill(w, seed);
  q.w = w.data();

  const int64_t groups = (q.width + q.block_width - 1) / q.block_width;
  const int64_t scale_rows = (q.outputs + q.block_outputs - 1) / q.block_outputs;
  const int64_t item = q.scale_type == ScaleType::kFloat32 ? 4 : 2;
  q.scales_stride = groups + bytes.below(3);
  Buffer scales(item * bytes_of(scale_rows, q.scales_stride, groups));
  fuzz::XorShift random(seed + 1);
  for (size_t n = 0; n < scales.size() / static_cast<size_t>(item); ++n) {
    // One, a half or a quarter in each type's own bits.
    const uint32_t power = static_cast<uint32_t>(random.below(3));
    const uint32_t bits = q.scale_type == ScaleType::kFloat32    ? 0x3f800000u - (power << 23)
                          : q.scale_type == ScaleType::kBfloat16 ? 0x3f80u - (power << 7)
                                                                 : 0x3c00u - (power << 10);
    std::memcpy(scales.data() + n * static_cast<size_t>(item), &bits, static_cast<size_t>(item));
  }
  q.scales = scales.data();

  const int64_t packed = q.kind == Quantised::kInt4 ? (groups + 1) / 2 : groups;
  q.zeros_stride = packed + bytes.below(3);
  Buffer zeros(bytes_of(q.outputs, q.zeros_stride, packed));
  fill(zeros, seed + 2);
  q.zeros = q.kind != Quantised::kFp8 && bytes.flag() && zeros.size() > 0 ? zeros.data() : nullptr;

  const int64_t x_stride = q.width + bytes.below(3), y_stride = q.outputs + bytes.below(3);
  const bool bf16 = bytes.flag(), with_bias = bytes.flag();
  const size_t wide = bf16 ? 2 : 4;
  const auto put = [&](Buffer& buffer, size_t n, float value) {
    const uint16_t half = qwen2vl::to_bf16(value);
    std::memcpy(buffer.data() + wide * n, bf16 ? static_cast<const void*>(&half) : &value, wide);
  };
  const auto get = [&](const Buffer& buffer, int64_t n) {
    float value = 0;
    uint16_t half = 0;
    std::memcpy(bf16 ? static_cast<void*>(&half) : &value, buffer.data() + wide * static_cast<size_t>(n), wide);
    return bf16 ? qwen2vl::from_bf16(half) : value;
  };
  Buffer x(static_cast<int64_t>(wide) * bytes_of(rows, x_stride, q.width)),
      bias(static_cast<int64_t>(wide) * q.outputs);
  for (Buffer* buffer : {&x, &bias}) {
    for (size_t n = 0; n < buffer->size() / wide; ++n) put(*buffer, n, static_cast<float>(random.below(17)) - 8.0f);
  }

  std::vector<float> first;
  for (size_t kernel = 0; kernel < qwen2vl::quant_kernels().size(); ++kernel) {
    std::vector<float> values(static_cast<size_t>(q.outputs * q.width));
    qwen2vl::quant_values({q, values.data(), q.width, false}, threads, kernel);
    if (kernel == 0) first = values;
    for (size_t n = 0; n < values.size(); ++n) {  // what is no number may have either sign
      const bool same = first[n] == values[n] || (std::isnan(first[n]) && std::isnan(values[n]));
      fuzz::expect(same, "values of all kernels", static_cast<int64_t>(n));
    }
    Buffer halves(2 * q.outputs * q.width);
    qwen2vl::quant_values({q, halves.data(), q.width, true}, threads, kernel);

    Buffer y(static_cast<int64_t>(wide) * bytes_of(rows, y_stride, q.outputs));
    const void* added = with_bias ? bias.data() : nullptr;
    qwen2vl::quant_linear({q, x.data(), x_stride, added, y.data(), y_stride, bf16, rows, nullptr, nullptr}, threads,
                          kernel);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t n = 0; n < q.outputs; ++n) {
        double sum = with_bias ? static_cast<double>(get(bias, n)) : 0, size_of_terms = std::fabs(sum);
        for (int64_t k = 0; k < q.width; ++k) {
          const double term =
              static_cast<double>(get(x, m * x_stride + k)) * static_cast<double>(values[size_t(n * q.width + k)]);
          sum += term;
          size_of_terms += std::fabs(term);
        }
        const double got = static_cast<double>(get(y, m * y_stride + n));
        const double room = 1e-5 * size_of_terms + (bf16 ? std::fabs(sum) / 256 : 0);
        const bool close = std::isnan(sum) ? std::isnan(got) : std::fabs(got - sum) <= room;
        fuzz::expect(close, "product", m * q.outputs + n);
      }
    }
  }
  return 0;
}
