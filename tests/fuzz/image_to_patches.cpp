// image_to_patches on frames of any size, layout and number of threads, with every set of row kernels. Each value is
// compared with a plain run (portable kernels, one thread, packed bytes), and what lies between the outputs must stay.
#include "cpu/image_to_patches.h"

#include "common/patch_index.h"
#include "cpu/resample.h"
#include "driver.h"

namespace {

using fuzz::Buffer;
using qwen2vl::FrameJob;
using qwen2vl::PatchOptions;
using qwen2vl::PatchType;

constexpr int64_t kMostSide = 300;

struct Frame {
  FrameJob job;
  Buffer source;
  int64_t out_values;            // length of the output, gaps included
  std::vector<uint8_t> written;  // (out_values), zero in the gaps
  std::vector<uint8_t> packed;   // what the plain run makes: (patches, 3, patch * patch)
};

Buffer make_source(fuzz::Bytes& bytes, FrameJob& job) {
  const int64_t used = job.width * job.channels;
  const int64_t padding = bytes.flag() ? bytes.below(40) : 0;
  const bool upside_down = bytes.flag();
  const int64_t stride = used + padding;
  Buffer source((job.height - 1) * stride + used);
  fuzz::XorShift random(bytes.take<uint32_t>());
  const int64_t kind = bytes.below(3);
  for (size_t n = 0; n < source.size(); ++n) {
    const uint64_t value = random();
    // Noise; black and white, where the sums of weights are extreme; white.
    source.data()[n] = static_cast<uint8_t>(kind == 0 ? value : kind == 1 ? (value & 1) * 255 : 255);
  }
  if (padding > 0) {
    for (int64_t y = 0; y + 1 < job.height; ++y) source.forbid(y * stride + used, padding);
  }
  job.pixels = source.data() + (upside_down ? (job.height - 1) * stride : 0);
  job.row_stride = upside_down ? -stride : stride;
  return source;
}

// Patches outermost, or channels outermost, with gaps between any of them.
void lay_out(fuzz::Bytes& bytes, Frame& frame, int64_t patches, int64_t area) {
  FrameJob& job = frame.job;
  job.copies = 1 + bytes.below(3);
  const int64_t slots = job.copies + bytes.below(2), gap = bytes.flag() ? bytes.below(20) : 0;
  if (bytes.below(4) != 0) {
    job.channel_stride = slots * area;
    job.patch_stride = 3 * job.channel_stride + gap;
  } else {
    job.patch_stride = slots * area + gap;
    job.channel_stride = patches * job.patch_stride;
  }
  frame.out_values = (patches - 1) * job.patch_stride + 2 * job.channel_stride + job.copies * area;
  frame.written.assign(static_cast<size_t>(frame.out_values), 0);
  for (int64_t p = 0; p < patches; ++p) {
    for (int64_t c = 0; c < 3; ++c) {
      const int64_t start = p * job.patch_stride + c * job.channel_stride;
      std::memset(frame.written.data() + start, 1, static_cast<size_t>(job.copies * area));
    }
  }
}

Frame make_frame(fuzz::Bytes& bytes, const PatchOptions& options) {
  const int64_t block = options.patch * options.merge, most = kMostSide / block > 0 ? kMostSide / block : 1;
  FrameJob job{};
  job.channels = bytes.pick({3, 1, 4});
  job.out_height = block * (1 + bytes.below(most));
  job.out_width = block * (1 + bytes.below(most));
  job.height = bytes.below(8) == 0 ? job.out_height : 1 + bytes.below(kMostSide);
  job.width = bytes.below(8) == 0 ? job.out_width : 1 + bytes.below(kMostSide);
  Buffer source = make_source(bytes, job);
  Frame frame{job, std::move(source), 0, {}, {}};
  const int64_t area = options.patch * options.patch;
  const int64_t patches = job.out_height * job.out_width / area;
  lay_out(bytes, frame, patches, area);

  frame.packed.resize(static_cast<size_t>(3 * patches * area));
  const Buffer out(static_cast<int64_t>(frame.packed.size()));
  FrameJob plain = frame.job;
  plain.out = const_cast<uint8_t*>(out.data());
  plain.copies = 1;
  plain.channel_stride = area;
  plain.patch_stride = 3 * area;
  const auto portable = static_cast<int64_t>(qwen2vl::row_kernels().size()) - 1;
  qwen2vl::image_to_patches({plain}, {options.patch, options.merge, PatchType::uint8, nullptr, 1, portable});
  std::memcpy(frame.packed.data(), out.data(), out.size());
  return frame;
}

// A value of its own for each byte of each channel.
template <class Value>
Value table_value(int64_t channel, int64_t byte) {
  return static_cast<Value>(1000 * (channel + 1) + byte);
}

template <class Value>
void check(const Frame& frame, const Buffer& out, int64_t area, bool table) {
  const FrameJob& job = frame.job;
  const int64_t patches = job.out_height * job.out_width / area;
  const auto* const values = reinterpret_cast<const Value*>(out.data());
  for (int64_t p = 0; p < patches; ++p) {
    for (int64_t c = 0; c < 3; ++c) {
      const uint8_t* const plain = frame.packed.data() + (3 * p + c) * area;
      const Value* got = values + p * job.patch_stride + c * job.channel_stride;
      for (int64_t copy = 0; copy < job.copies; ++copy, got += area) {
        for (int64_t n = 0; n < area; ++n) {
          const Value want = table ? table_value<Value>(c, plain[n]) : static_cast<Value>(plain[n]);
          fuzz::expect(got[n] == want, "a value differs from the plain run", got + n - values);
        }
      }
    }
  }
  for (int64_t n = 0; n < frame.out_values; ++n) {
    if (frame.written[static_cast<size_t>(n)]) continue;
    for (size_t byte = 0; byte < sizeof(Value); ++byte) {
      const size_t at = static_cast<size_t>(n) * sizeof(Value) + byte;
      fuzz::expect(out.data()[at] == 0xa5, "a value between the outputs was written", n);
    }
  }
}

template <class Value>
void run(std::vector<Frame>& frames, PatchOptions options) {
  const bool table = options.type != PatchType::uint8;
  Buffer values(table ? 768 * static_cast<int64_t>(sizeof(Value)) : 0);
  if (table) {
    for (int64_t n = 0; n < 768; ++n) reinterpret_cast<Value*>(values.data())[n] = table_value<Value>(n / 256, n % 256);
    options.table = values.data();
  }
  for (size_t kernels = 0; kernels < qwen2vl::row_kernels().size(); ++kernels) {
    options.kernels = static_cast<int64_t>(kernels);
    std::vector<Buffer> outs;
    std::vector<FrameJob> jobs;
    for (Frame& frame : frames) {
      outs.emplace_back(frame.out_values * static_cast<int64_t>(sizeof(Value)));
      jobs.push_back(frame.job);
      jobs.back().out = outs.back().data();
    }
    qwen2vl::image_to_patches(jobs, options);
    for (size_t n = 0; n < frames.size(); ++n) check<Value>(frames[n], outs[n], options.patch * options.patch, table);
  }
}

// packed_row and grid_place are each other's inverse.
void check_index(const PatchOptions& options, const FrameJob& job) {
  const auto rows = static_cast<int32_t>(job.out_height / options.patch);
  const auto columns = static_cast<int32_t>(job.out_width / options.patch);
  const qwen2vl::PatchIndex index{static_cast<int32_t>(options.patch), static_cast<int32_t>(options.merge), columns};
  for (int64_t packed = 0; packed < int64_t{rows} * columns; ++packed) {
    int32_t row = -1, column = -1;
    index.grid_place(packed, &row, &column);
    fuzz::expect(row >= 0 && row < rows && column >= 0 && column < columns, "grid_place left the grid", packed);
    fuzz::expect(index.packed_row(row, column) == packed, "packed_row does not undo grid_place", packed);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  PatchOptions options{};
  options.patch = bytes.pick({14, 14, 14, 16, 1, 2, 3, 7, 13, 15, 28});
  options.merge = bytes.pick({2, 2, 1, 3, 4});
  options.type = static_cast<PatchType>(bytes.below(3));
  options.threads = 1 + bytes.below(3);
  const int64_t count = bytes.pick({1, 1, 2, 3, 0});
  std::vector<Frame> frames;
  for (int64_t n = 0; n < count; ++n) {
    frames.push_back(make_frame(bytes, options));
    check_index(options, frames.back().job);
  }
  switch (options.type) {
    case PatchType::uint8:
      run<uint8_t>(frames, options);
      break;
    case PatchType::float32:
      run<float>(frames, options);
      break;
    case PatchType::bfloat16:
      run<uint16_t>(frames, options);
      break;
  }
  return 0;
}
