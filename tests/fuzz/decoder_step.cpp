// A step's attention and products of any size and stride, by every instruction set: nothing outside of the buffers is
// touched, what is stored is the same bits by all, and results are the same within rounding.
#include "cpu/decoder_step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "driver.h"

namespace {

using fuzz::Buffer;

// bf16 of -2 to 2.
void fill(Buffer& buffer, uint64_t seed) {
  fuzz::XorShift random(seed);
  for (size_t n = 0; n + 1 < buffer.size(); n += 2) {
    const uint16_t half = qwen2vl::to_bf16(static_cast<float>(random.below(257)) / 64 - 2);
    std::memcpy(buffer.data() + n, &half, 2);
  }
}

Buffer halves(int64_t count, uint64_t seed) {
  Buffer made(2 * count);
  fill(made, seed);
  return made;
}

uint16_t* of(Buffer& buffer) { return reinterpret_cast<uint16_t*>(buffer.data()); }

void alike(Buffer& first, Buffer& other, double room, const char* what) {
  for (size_t n = 0; n < first.size() / 2; ++n) {
    const double a = qwen2vl::from_bf16(of(first)[n]), b = qwen2vl::from_bf16(of(other)[n]);
    fuzz::expect(std::fabs(a - b) <= room + std::fabs(a) / 64, what, static_cast<int64_t>(n));
  }
}

void attention(fuzz::Bytes& bytes) {
  qwen2vl::DecodeAttention p{};
  p.rows = bytes.below(4);
  p.kv_heads = 1 + bytes.below(3);
  p.heads = p.kv_heads * (1 + bytes.below(10));
  p.columns = 16 * (1 + bytes.below(6));
  p.capacity = bytes.flag() ? bytes.below(40) : 500 + bytes.below(600);
  p.scale = 0.2f;
  const uint64_t seed = bytes.take<uint32_t>();
  const int64_t threads = 1 + bytes.below(3);
  const int64_t wide = p.columns + bytes.below(3), slot = p.kv_heads * wide, row = p.capacity * slot + bytes.below(3);
  const auto rows_of = [&](int64_t heads) {
    return halves(p.rows == 0 ? 0 : (p.rows * heads - 1) * wide + p.columns, seed + static_cast<uint64_t>(heads));
  };
  Buffer q = rows_of(p.heads), k = rows_of(p.kv_heads), v = rows_of(p.kv_heads);
  p.q = of(q), p.k = of(k), p.v = of(v);
  p.q_strides = {p.heads * wide, wide};
  p.k_strides = p.v_strides = {p.kv_heads * wide, wide};
  p.k_cache_strides = p.v_cache_strides = {row, slot, wide};
  Buffer lengths(4 * p.rows), positions(8 * p.rows), frequencies(2 * p.columns);
  fuzz::XorShift random(seed);
  for (int64_t n = 0; n < p.rows; ++n) {
    const int32_t length = static_cast<int32_t>(random.below(static_cast<uint64_t>(p.capacity) + 4)) - 1;
    const int64_t position = static_cast<int64_t>(random.below(5000));
    std::memcpy(lengths.data() + 4 * n, &length, 4);
    std::memcpy(positions.data() + 8 * n, &position, 8);
  }
  for (int64_t n = 0; n < p.columns / 2; ++n) {
    const float frequency = 1.0f / static_cast<float>(1 + n);
    std::memcpy(frequencies.data() + 4 * n, &frequency, 4);
  }
  p.lengths = reinterpret_cast<const int32_t*>(lengths.data());
  p.positions = positions.data();
  p.inv_freq = reinterpret_cast<const float*>(frequencies.data());
  p.lengths_stride = p.positions_stride = 1;
  p.positions_bytes = 8;
  const int64_t cached = p.rows * p.capacity == 0 ? 0 : p.rows * row;
  std::vector<Buffer> first;  // the result and the keys of the first kernel
  for (size_t kernel = 0; kernel < qwen2vl::step_kernels().size(); ++kernel) {
    Buffer keys = halves(cached, seed + 7), values = halves(cached, seed + 8), out(2 * p.rows * p.heads * p.columns);
    p.k_cache = of(keys), p.v_cache = of(values), p.out = of(out);
    qwen2vl::decode_attention(p, threads, kernel);
    if (kernel == 0) {
      first.push_back(std::move(out));
      first.push_back(std::move(keys));
      continue;
    }
    alike(first[0], out, 1e-2, "attention of all kernels");
    const bool same = keys.size() == 0 || std::memcmp(keys.data(), first[1].data(), keys.size()) == 0;
    fuzz::expect(same, "stored keys of all kernels");
  }
}

void products(fuzz::Bytes& bytes) {
  const int64_t rows = bytes.below(18), outputs = bytes.below(70), width = bytes.below(140);
  const int64_t threads = 1 + bytes.below(3), x_stride = width + bytes.below(3), w_stride = width + bytes.below(3);
  const int64_t y_stride = outputs + bytes.below(3);
  const uint64_t seed = bytes.take<uint32_t>();
  const auto sized = [](int64_t count, int64_t stride, int64_t columns) {
    return count * columns == 0 ? 0 : (count - 1) * stride + columns;
  };
  Buffer x = halves(sized(rows, x_stride, width), seed), norm = halves(width, seed + 1);
  Buffer w = halves(sized(outputs, w_stride, width), seed + 2), up = halves(sized(outputs, w_stride, width), seed + 3);
  const qwen2vl::RmsNorm ahead{of(x), x_stride, of(norm), 0.5f};
  const int64_t results = sized(rows, y_stride, outputs);
  std::vector<Buffer> firsts;
  for (size_t kernel = 0; kernel < qwen2vl::few_rows_kernels().size(); ++kernel) {
    Buffer found[3] = {halves(results, seed + 4), halves(results, seed + 4), halves(results, seed + 4)};
    const auto product = [&](Buffer& weight, Buffer& y) {
      return qwen2vl::FewRows{of(x), x_stride, of(weight), w_stride, nullptr, of(y), y_stride, rows, outputs, width};
    };
    qwen2vl::rms_norm_linear(ahead, {product(w, found[0]), {}, {}}, threads, kernel);
    qwen2vl::rms_norm_swiglu(ahead, product(w, found[1]), product(up, found[1]), threads, kernel,
                             std::min(kernel, qwen2vl::step_kernels().size() - 1));
    qwen2vl::linear_add(product(w, found[2]), threads, kernel);
    for (size_t n = 0; n < 3; ++n) {
      if (kernel == 0) {
        firsts.push_back(std::move(found[n]));
      } else {
        alike(firsts[n], found[n], 0.5, "products of all kernels");
      }
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  if (bytes.flag()) {
    attention(bytes);
  } else {
    products(bytes);
  }
  return 0;
}
