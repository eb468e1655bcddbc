// Pixels to patches in one pass: input rows go through the horizontal resize into a ring, each output row is made from
// the ring and cut into its patches at once. Nothing of an image's size is held in between, so that all but the first
// read and the last write stay in the cache.
#include "image_to_patches.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "../common/bicubic.h"
#include "../common/patch_index.h"
#include "resample.h"

namespace qwen2vl {
namespace {

constexpr int64_t kBandsPerThread = 4;  // so that threads that lag do little harm

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void expand_to_rgb(const uint8_t* row, int64_t width, int64_t channels, uint8_t* out) {
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t c = 0; c < 3; ++c) {
      out[3 * i + c] = channels == 1 ? row[i] : over_white(row[4 * i + c], row[4 * i + 3]);
    }
  }
}

// Rows of a frame as interleaved RGB: where they lie, or expanded where the frame is not RGB. The last `kept` stay
// valid.
class RgbRows {
 public:
  RgbRows(const FrameJob& job, int64_t kept) : job_(job), kept_(job.channels == 3 ? 0 : kept) {
    rgb_.resize(static_cast<size_t>(3 * job.width * kept_));
    holds_.assign(static_cast<size_t>(kept_), -1);
  }

  const uint8_t* operator()(int64_t y) {
    const uint8_t* const row = job_.pixels + y * job_.row_stride;
    if (kept_ == 0) return row;
    const int64_t slot = y % kept_;
    uint8_t* const rgb = rgb_.data() + 3 * job_.width * slot;
    if (holds_[static_cast<size_t>(slot)] != y) expand_to_rgb(row, job_.width, job_.channels, rgb);
    holds_[static_cast<size_t>(slot)] = y;
    return rgb;
  }

 private:
  const FrameJob& job_;
  const int64_t kept_;
  std::vector<uint8_t> rgb_;
  std::vector<int64_t> holds_;
};

// kRowGroup rows at most go through the horizontal pass together; out[r] is the red plane of row r.
void resize_across(const AxisTaps& across, const RowKernels& kernels, const uint8_t** in, uint8_t** out, int64_t group,
                   uint8_t* spare, int64_t plane_stride) {
  if (across.identity()) {
    for (int64_t r = 0; r < group; ++r) kernels.split(in[r], across.in, out[r], plane_stride);
    return;
  }
  for (int64_t r = group; r < kRowGroup; ++r) in[r] = in[0], out[r] = spare;
  kernels.horizontal(across, in, out, plane_stride);
}

// Planar rows of a band of the resized frame, the horizontal pass first: its rows go into a ring, made when needed.
class AcrossThenDown {
 public:
  AcrossThenDown(const FrameJob& job, const AxisTaps& across, const AxisTaps& down, const RowKernels& kernels)
      : job_(job),
        across_(across),
        down_(down),
        kernels_(kernels),
        source_(job, kRowGroup),
        plane_(round_up(job.out_width, kRowAlign)),
        capacity_((down.identity() ? 1 : down.most) + kRowGroup),
        ring_(static_cast<size_t>(3 * plane_ * capacity_)),
        made_(static_cast<size_t>(3 * plane_)),
        spare_(static_cast<size_t>(3 * plane_)),
        rows_(static_cast<size_t>(down.most)) {}

  int64_t plane_stride() const { return plane_; }

  const uint8_t* operator()(int64_t y) {
    if (down_.identity()) {
      need(y, y + 1);
      return row(y);
    }
    const int64_t first = down_.first[static_cast<size_t>(y)], count = down_.count[static_cast<size_t>(y)];
    need(first, first + count);
    for (int64_t k = 0; k < count; ++k) rows_[static_cast<size_t>(k)] = row(first + k);
    kernels_.vertical(down_, y, rows_.data(), made_.data(), 3 * plane_);
    return made_.data();
  }

 private:
  uint8_t* row(int64_t y) { return ring_.data() + 3 * plane_ * (y % capacity_); }

  void need(int64_t first, int64_t last) {
    next_ = std::max(next_, first);
    while (next_ < last) {
      const int64_t group = std::min<int64_t>(kRowGroup, job_.height - next_);
      const uint8_t* in[kRowGroup];
      uint8_t* out[kRowGroup];
      for (int64_t r = 0; r < group; ++r) in[r] = source_(next_ + r), out[r] = row(next_ + r);
      resize_across(across_, kernels_, in, out, group, spare_.data(), plane_);
      next_ += group;
    }
  }

  const FrameJob& job_;
  const AxisTaps &across_, &down_;
  const RowKernels& kernels_;
  RgbRows source_;
  const int64_t plane_, capacity_;
  int64_t next_ = 0;
  std::vector<uint8_t> ring_, made_, spare_;
  std::vector<const uint8_t*> rows_;
};

// The same with the vertical pass first, which reads the frame's own rows.
class DownThenAcross {
 public:
  DownThenAcross(const FrameJob& job, const AxisTaps& across, const AxisTaps& down, const RowKernels& kernels,
                 int64_t end)
      : across_(across),
        down_(down),
        kernels_(kernels),
        source_(job, down.most),
        end_(end),
        width_(3 * job.width),
        plane_(round_up(job.out_width, kRowAlign)),
        mixed_(static_cast<size_t>(width_ * kRowGroup)),
        made_(static_cast<size_t>(3 * plane_ * (kRowGroup + 1))),
        rows_(static_cast<size_t>(down.most)) {}

  int64_t plane_stride() const { return plane_; }

  const uint8_t* operator()(int64_t y) {
    if (y >= next_) make(y);
    return made_.data() + 3 * plane_ * (y - first_);
  }

 private:
  void make(int64_t y) {
    const int64_t group = std::min<int64_t>(kRowGroup, end_ - y);
    const uint8_t* in[kRowGroup];
    uint8_t* out[kRowGroup];
    for (int64_t r = 0; r < group; ++r) {
      const auto at = static_cast<size_t>(y + r);
      for (int32_t k = 0; k < down_.count[at]; ++k) rows_[static_cast<size_t>(k)] = source_(down_.first[at] + k);
      uint8_t* const mixed = mixed_.data() + width_ * r;
      kernels_.vertical(down_, y + r, rows_.data(), mixed, width_);
      in[r] = mixed;
      out[r] = made_.data() + 3 * plane_ * r;
    }
    resize_across(across_, kernels_, in, out, group, made_.data() + 3 * plane_ * kRowGroup, plane_);
    first_ = y;
    next_ = y + group;
  }

  const AxisTaps &across_, &down_;
  const RowKernels& kernels_;
  RgbRows source_;
  const int64_t end_, width_, plane_;
  int64_t first_ = 0, next_ = 0;  // rows that made_ holds
  std::vector<uint8_t> mixed_, made_;
  std::vector<const uint8_t*> rows_;
};

// Spreads output rows over the patches they cross.
class Scatter {
 public:
  Scatter(const FrameJob& job, const PatchOptions& options)
      : job_(job), options_(options), starts_(static_cast<size_t>(job.out_width / options.patch)) {}

  void row(int64_t y, const uint8_t* planes, int64_t plane_stride) {
    const int64_t grid_row = y / options_.patch;
    if (grid_row != grid_row_) find_starts(grid_row);
    switch (options_.type) {
      case PatchType::uint8:
        return write<uint8_t>(y, planes, plane_stride);
      case PatchType::float32:
        return write<float>(y, planes, plane_stride);
      case PatchType::bfloat16:
        return write<uint16_t>(y, planes, plane_stride);
    }
  }

 private:
  // Divisions once for a row of patches.
  void find_starts(int64_t grid_row) {
    const PatchIndex index{static_cast<int32_t>(options_.patch), static_cast<int32_t>(options_.merge),
                           static_cast<int32_t>(starts_.size())};
    for (size_t column = 0; column < starts_.size(); ++column) {
      starts_[column] =
          index.packed_row(static_cast<int32_t>(grid_row), static_cast<int32_t>(column)) * job_.patch_stride;
    }
    grid_row_ = grid_row;
  }

  template <class Value>
  void write(int64_t y, const uint8_t* planes, int64_t plane_stride) const {
    const int64_t patch = options_.patch;
    Value* const first = static_cast<Value*>(job_.out) + (y % patch) * patch;
    for (const int64_t start : starts_) {
      for (int64_t c = 0; c < 3; ++c) {
        const auto* const table = options_.table ? static_cast<const Value*>(options_.table) + 256 * c : nullptr;
        Value* out = first + start + c * job_.channel_stride;
        for (int64_t copy = 0; copy < job_.copies; ++copy, out += patch * patch) {
          write_piece(planes + c * plane_stride, patch, table, out);
        }
      }
      planes += patch;
    }
  }

  static void write_piece(const uint8_t* bytes, int64_t patch, const uint8_t*, uint8_t* out) {
    if (patch == 14) {  // two moves of 8 that overlap
      std::memcpy(out, bytes, 8);
      std::memcpy(out + 6, bytes + 6, 8);
    } else {
      std::memcpy(out, bytes, static_cast<size_t>(patch));
    }
  }

  template <class Value>
  static void write_piece(const uint8_t* bytes, int64_t patch, const Value* table, Value* out) {
    for (int64_t x = 0; x < patch; ++x) out[x] = table[bytes[x]];
  }

  const FrameJob& job_;
  const PatchOptions& options_;
  std::vector<int64_t> starts_;  // of the patches that cross the current row, in values
  int64_t grid_row_ = -1;
};

struct FramePlan {
  std::shared_ptr<const AxisTaps> across, down;
};

template <class Rows>
void scatter_band(const FrameJob& job, const PatchOptions& options, int64_t begin, int64_t end, Rows rows) {
  Scatter scatter(job, options);
  for (int64_t y = begin; y < end; ++y) scatter.row(y, rows(y), rows.plane_stride());
}

void run_band(const FrameJob& job, const FramePlan& plan, const PatchOptions& options, const RowKernels& kernels,
              int64_t begin, int64_t end) {
  const AxisTaps &across = *plan.across, &down = *plan.down;
  if (vertical_first(job.height, job.width, job.out_height, job.out_width) && !across.identity()) {
    scatter_band(job, options, begin, end, DownThenAcross(job, across, down, kernels, end));
  } else {
    scatter_band(job, options, begin, end, AcrossThenDown(job, across, down, kernels));
  }
}

struct Band {
  size_t job;
  int64_t begin, end;  // output rows
};

}  // namespace

void image_to_patches(const std::vector<FrameJob>& jobs, const PatchOptions& options) {
  const RowKernels& kernels = row_kernels()[static_cast<size_t>(options.kernels)];
  std::map<std::pair<int64_t, int64_t>, std::shared_ptr<const AxisTaps>> known;
  const auto taps = [&known](int64_t in, int64_t out) {
    auto& entry = known[{in, out}];
    if (entry == nullptr) entry = std::make_shared<const AxisTaps>(make_taps(in, out));
    return entry;
  };
  std::vector<FramePlan> plans;
  int64_t pixels = 0;
  for (const FrameJob& job : jobs) {
    plans.push_back({taps(job.width, job.out_width), taps(job.height, job.out_height)});
    pixels += job.height * job.width + job.out_height * job.out_width;
  }

  const int64_t threads = options.threads;
  std::vector<Band> bands;
  for (size_t n = 0; n < jobs.size(); ++n) {
    const int64_t share = jobs[n].height * jobs[n].width + jobs[n].out_height * jobs[n].out_width;
    // Bands of whole patch rows: two threads never write to the same patch.
    const int64_t patch_rows = jobs[n].out_height / options.patch;
    const int64_t wanted = threads == 1 ? 1 : 1 + share * threads * kBandsPerThread / std::max<int64_t>(pixels, 1);
    const int64_t rows = (patch_rows + wanted - 1) / wanted * options.patch;
    for (int64_t y = 0; y < jobs[n].out_height; y += rows) {
      bands.push_back({n, y, std::min(y + rows, jobs[n].out_height)});
    }
  }

  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      for (size_t n = next++; n < bands.size(); n = next++) {
        const Band& band = bands[n];
        run_band(jobs[band.job], plans[band.job], options, kernels, band.begin, band.end);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t n = 1; n < std::min<int64_t>(threads, static_cast<int64_t>(bands.size())); ++n) {
      helpers.emplace_back(work);
    }
  } catch (const std::system_error&) {
    // No more threads to be had: those that run share the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace qwen2vl
