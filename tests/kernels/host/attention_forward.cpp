// Runs the attention kernel for Hopper on one case from a file, at a time (set_time), and writes its results to another
// file.
#include "cuda_on_host.h"
// The kernel comes after what it is made of.
#include "cuda/sm90.cuh"
//
#include <fstream>

#include "cuda/attention_forward.cuh"
#include "cuda/attention_maps.h"

namespace {

using namespace qwen2vl;

using Config = AttentionConfig<QWEN2VL_CONFIG>;
constexpr AttentionShape kShape = Config::kShape;

// As tests/kernels/attention_on_host.py writes them.
struct Header {
  int64_t fp16, causal, heads, kv_heads, rows, key_rows;
  int64_t strides[6];  // of rows and heads of q, k, v
  int64_t sizes[3];    // elements of the buffers of q, k, v
  int64_t tiles, width, least, most, blocks;
  double scale;
};

template <class T>
std::vector<T> read(std::ifstream& file, int64_t count) {
  std::vector<T> all(static_cast<size_t>(count));
  file.read(reinterpret_cast<char*>(all.data()), static_cast<std::streamsize>(sizeof(T) * all.size()));
  if (!file) std::exit(3);
  return all;
}

TensorMap map_of(const std::vector<uint16_t>& buffer, const int64_t* strides, int64_t rows, int64_t heads, int box) {
  const AttentionTensor tensor{buffer.data(), strides[0], strides[1], rows};
  return on_host::tensor_map(attention_map(kShape, tensor, static_cast<int>(heads), box));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  on_host::set_time(arguments[3]);
  std::ifstream file(arguments[1], std::ios::binary);
  const Header header = read<Header>(file, 1)[0];
  const auto tiles = read<int32_t>(file, header.tiles * header.width);
  const auto q = read<uint16_t>(file, header.sizes[0]), k = read<uint16_t>(file, header.sizes[1]),
             v = read<uint16_t>(file, header.sizes[2]);
  const TensorMap q_map = map_of(q, header.strides, header.rows, header.heads, kShape.rows());
  const bool keys = header.key_rows > 0;
  const TensorMap k_map = keys ? map_of(k, header.strides + 2, header.key_rows, header.kv_heads, kShape.keys) : q_map;
  const TensorMap v_map = keys ? map_of(v, header.strides + 4, header.key_rows, header.kv_heads, kShape.keys) : q_map;

  std::vector<uint16_t> out(static_cast<size_t>(header.rows * header.heads * kShape.head), 0x7FFF);
  std::vector<float> lse(static_cast<size_t>(header.rows * header.heads), NAN);
  const AttentionWork work{tiles.data(),
                           static_cast<int32_t>(header.tiles),
                           static_cast<int32_t>(header.width),
                           static_cast<int32_t>(header.least),
                           static_cast<int32_t>(header.most),
                           static_cast<int32_t>(header.heads),
                           static_cast<int32_t>(header.heads / header.kv_heads),
                           out.data(),
                           lse.data(),
                           header.rows,
                           static_cast<float>(header.scale)};
  const auto run = [&](auto kernel) {
    on_host::run_grid(static_cast<unsigned>(header.blocks), kShape.threads(), kShape.shared_bytes(),
                      [&] { kernel(q_map, k_map, v_map, work); });
  };
  if (header.fp16 && header.causal) run(attention_forward<Config, Element::kFloat16, true>);
  if (header.fp16 && !header.causal) run(attention_forward<Config, Element::kFloat16, false>);
  if (!header.fp16 && header.causal) run(attention_forward<Config, Element::kBfloat16, true>);
  if (!header.fp16 && !header.causal) run(attention_forward<Config, Element::kBfloat16, false>);
  std::ofstream results(arguments[2], std::ios::binary);
  results.write(reinterpret_cast<const char*>(out.data()), static_cast<std::streamsize>(2 * out.size()));
  results.write(reinterpret_cast<const char*>(lse.data()), static_cast<std::streamsize>(4 * lse.size()));
  return 0;
}
