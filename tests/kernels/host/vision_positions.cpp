// Reads grids as numbers, runs the CUDA kernels of the patch coordinates, prints the coordinates.
#include "cuda_on_host.h"
// The kernels come after what they are made of.
#include "cuda/vision_positions.cuh"

static int64_t read() {
  long long number = 0;
  if (std::scanf("%lld", &number) != 1) std::exit(1);
  return number;
}

int main() {
  const int64_t items = read(), merge = read(), patches = read();
  const auto threads = static_cast<unsigned>(read());
  std::vector<int64_t> numbers(static_cast<size_t>(3 * items)), ends(static_cast<size_t>(items));
  for (int64_t& number : numbers) number = read();
  const qwen2vl::IntView grids{numbers.data(), 8, 3, 1};
  std::vector<qwen2vl::PatchPosition> positions(static_cast<size_t>(patches), {INT64_MIN, INT64_MIN});
  on_host::run_block(0, threads, [&] { qwen2vl::vision_sums(grids, items, merge, ends.data()); });
  for (unsigned block = 0; block * threads < patches; ++block) {
    on_host::run_block(block, threads,
                       [&] { qwen2vl::vision_place(grids, items, merge, ends.data(), patches, positions.data()); });
  }
  for (const auto& at : positions) {
    std::printf("%lld %lld ", static_cast<long long>(at.row), static_cast<long long>(at.column));
  }
}
