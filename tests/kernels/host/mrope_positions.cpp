// Reads one call of the M-RoPE position builder as numbers, runs its CUDA kernels, prints positions, deltas and states.
#include "cuda_on_host.h"
// The kernels come after what they are made of.
#include "cuda/mrope_positions.cuh"

using qwen2vl::IntView;

static std::vector<int64_t> read(int64_t count) {
  std::vector<int64_t> values(static_cast<size_t>(count));
  for (int64_t& value : values) {
    long long number = 0;
    if (std::scanf("%lld", &number) != 1) std::exit(1);
    value = number;
  }
  return values;
}

int main() {
  const std::vector<int64_t> head = read(12);
  const int64_t rows = head[0], columns = head[1], images = head[2], videos = head[3], sequences = head[4];
  const bool masked = head[8] != 0, packed = head[9] != 0, chunked = head[10] != 0;
  const auto threads = static_cast<unsigned>(head[11]);
  const std::vector<int64_t> ids = read(rows * columns), mask = read(masked ? rows * columns : 0);
  const std::vector<int64_t> image_grids = read(3 * images), video_grids = read(3 * videos);
  const std::vector<int64_t> cu_seqlens = read(packed ? sequences + 1 : 0);
  const std::vector<int64_t> state = read(chunked ? qwen2vl::kStateSize * sequences : 0);

  const qwen2vl::MropeInput in{IntView{ids.data(), 8, columns, 1},
                               IntView{masked ? mask.data() : nullptr, 8, columns, 1},
                               IntView{image_grids.data(), 8, 3, 1},
                               IntView{video_grids.data(), 8, 3, 1},
                               IntView{packed ? cu_seqlens.data() : nullptr, 8, 0, 1},
                               rows,
                               columns,
                               images,
                               videos,
                               sequences,
                               head[5],
                               head[6],
                               head[7],
                               IntView{chunked ? state.data() : nullptr, 8, qwen2vl::kStateSize, 1}};
  const int64_t bytes = qwen2vl::MropeWorkspace::bytes(in.tokens(), images, videos, sequences);
  int64_t* const memory = static_cast<int64_t*>(std::malloc(static_cast<size_t>(bytes)));  // no spare byte at its end
  const auto workspace = qwen2vl::MropeWorkspace::at(memory, images, videos, sequences);
  std::vector<int64_t> positions(static_cast<size_t>(3 * in.tokens()), INT64_MIN),
      delta(static_cast<size_t>(sequences), INT64_MIN), after(state.size(), INT64_MIN);

  on_host::run_block(0, threads, [&] { qwen2vl::mrope_scan(in, workspace); });
  const int64_t work = in.tokens() > sequences ? in.tokens() : sequences;
  for (unsigned block = 0; block * threads < work; ++block) {
    on_host::run_block(block, threads, [&] {
      qwen2vl::mrope_fill(in, workspace, positions.data(), delta.data(), chunked ? after.data() : nullptr);
    });
  }
  for (const int64_t value : positions) std::printf("%lld ", static_cast<long long>(value));
  for (const int64_t value : delta) std::printf("%lld ", static_cast<long long>(value));
  for (const int64_t value : after) std::printf("%lld ", static_cast<long long>(value));
  std::free(memory);
}
