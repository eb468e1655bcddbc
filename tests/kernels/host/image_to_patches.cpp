// Reads one call of image_to_patches as int64 and bytes, runs its CUDA kernels, prints the bytes of the result.
//
// Input: patch, merge, PatchType, frames of a launch, bytes in between, bytes staged, threads of a block (32, 64, ...),
// number of frames, bytes of the result; the table where values are not bytes; the result before the call; per frame
// height, width, channels, row stride, wanted height and width, first output byte, patch stride, channel stride,
// copies, bytes of pixels, byte of the first pixel; then its pixels.
#include "cuda_on_host.h"
// The kernels come after what they are made of.
#include "cuda/image_to_patches_plan.h"

template <class T>
static std::unique_ptr<T[]> read(int64_t count) {
  std::unique_ptr<T[]> values(new T[static_cast<size_t>(count)]);  // no spare byte at its end
  if (std::fread(values.get(), sizeof(T), static_cast<size_t>(count), stdin) != static_cast<size_t>(count))
    std::exit(3);
  return values;
}

struct Launcher {
  unsigned threads;

  template <class... Taken, class... Given>
  void operator()(void (*kernel)(Taken...), qwen2vl::Grid grid, const Given&... given) const {
    // Fewer threads than on a device: more blocks where a thread makes one output, else more rounds of each thread.
    const bool single = grid.shared_bytes == 0 && sizeof...(Given) == 4;
    const int64_t blocks = single ? grid.blocks * qwen2vl::kPatchThreads / threads : grid.blocks;
    on_host::run_grid(static_cast<unsigned>(blocks), static_cast<unsigned>(grid.frames), threads,
                      static_cast<size_t>(grid.shared_bytes), [&] { kernel(given...); });
  }
};

int main() {
  const auto head = read<int64_t>(9);
  const auto type = static_cast<qwen2vl::PatchType>(head[2]);
  const int64_t value_bytes = type == qwen2vl::PatchType::uint8 ? 1 : type == qwen2vl::PatchType::float32 ? 4 : 2;
  const auto table = read<char>(type == qwen2vl::PatchType::uint8 ? 0 : 3 * 256 * value_bytes);
  const qwen2vl::PatchOptions options{head[0], head[1], type, table.get(), 1, 0};
  const qwen2vl::FrameLimits limits{head[3], head[4], head[5]};
  const auto out = read<char>(head[8]);
  std::vector<std::unique_ptr<uint8_t[]>> pixels;
  std::vector<qwen2vl::FrameJob> jobs;
  for (int64_t n = 0; n < head[7]; ++n) {
    const auto frame = read<int64_t>(12);
    pixels.push_back(read<uint8_t>(frame[10]));
    jobs.push_back({pixels.back().get() + frame[11], frame[0], frame[1], frame[2], frame[3], frame[4], frame[5],
                    out.get() + frame[6], frame[7], frame[8], frame[9]});
  }
  const int64_t bytes = qwen2vl::workspace_bytes(jobs, options, limits);
  const std::unique_ptr<uint8_t[]> workspace(new uint8_t[static_cast<size_t>(bytes)]);
  std::memset(workspace.get(), 0x5a, static_cast<size_t>(bytes));
  if (!enqueue(jobs, options, limits, workspace.get(), Launcher{static_cast<unsigned>(head[6])})) return 4;
  std::fwrite(out.get(), 1, static_cast<size_t>(head[8]), stdout);
}
