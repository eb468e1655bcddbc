// Which launches make the patches of a batch: host code, the same for the stream of a device and for the tests.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "image_to_patches.cuh"

namespace qwen2vl {

struct Grid {
  int64_t blocks, frames, shared_bytes;
};

// What bounds the launches; tests take less.
struct FrameLimits {
  int64_t frames = kMostFrames;               // of one launch
  int64_t between_bytes = int64_t{24} << 20;  // of all frames of a launch, one frame excepted: part of an L2 cache
  int64_t staged_bytes = 32 << 10;            // of shared memory: with the tile, five blocks share a multiprocessor
};

// Hands out pieces of the workspace; from address 0 on it only measures.
struct Carver {
  uintptr_t base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    const int64_t at = used;
    used = (used + count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return reinterpret_cast<T*>(base + static_cast<uintptr_t>(at));
  }
};

// Frames of one size, which share weights and launches.
struct FrameGroup {
  FrameJob job;  // of the first
  std::vector<FramePlace> places;
};

inline std::vector<FrameGroup> frame_groups(const std::vector<FrameJob>& jobs) {
  std::vector<FrameGroup> groups;
  std::map<std::array<int64_t, 7>, size_t> known;
  for (const FrameJob& job : jobs) {
    const std::array<int64_t, 7> key = {job.height,    job.width,        job.channels,      job.out_height,
                                        job.out_width, job.patch_stride, job.channel_stride};
    const auto [entry, fresh] = known.try_emplace(key, groups.size());
    if (fresh) groups.push_back({job, {}});
    groups[entry->second].places.push_back({job.pixels, job.row_stride, job.out, job.copies});
  }
  return groups;
}

// One launch of `resample`.
struct Step {
  Pass pass;
  bool from_between;
  Resample parameters;
  int64_t blocks, shared_bytes;
};

// What a group needs: weights, then for each share of its frames the steps one after the other.
struct GroupPlan {
  BicubicAxis across, down;
  AxisTable across_table, down_table;  // without outputs where the axis does not change
  std::vector<Step> steps;
  int64_t frames;  // of one launch
  int64_t bytes;   // of workspace

  int64_t weights() const { return across_table.out + down_table.out; }
};

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Tiles of `columns` by as many rows as there is shared memory for, which do not cross multiples of `unit` rows; the
// number of them.
inline int64_t set_tiles(Resample& r, int64_t width, int64_t height, int64_t columns, int64_t unit) {
  r.width = width;
  r.columns = static_cast<int32_t>(columns);
  r.pitch = static_cast<int32_t>((columns + 3) / 4 * 4);
  r.by_words = SmallDivider::by(r.pitch / 4);
  r.rows = static_cast<int32_t>(std::min<int64_t>(kTileBytes / r.pitch, unit));
  r.column_tiles = static_cast<int32_t>(tiles_of(width, columns));
  r.unit = static_cast<int32_t>(unit);
  r.unit_tiles = static_cast<int32_t>(tiles_of(unit, r.rows));
  return r.column_tiles * (height / unit) * r.unit_tiles;
}

// Words of one input row that a tile of a pass along the rows reads, or 0 where they are too many.
inline int32_t staged_words(const BicubicAxis& axis, int64_t columns, const FrameLimits& limits) {
  int64_t most = 0;
  for (int64_t x = 0; x < axis.out; x += columns) {
    const TapWindow first = axis.window(x), last = axis.window(std::min(x + columns, axis.out) - 1);
    most = std::max<int64_t>(most, last.first + last.count - first.first / 4 * 4);
  }
  const int64_t words = staged_place((most + 3) / 4 * 4);
  const int64_t bytes = words * kRowsAtOnce * static_cast<int64_t>(sizeof(uint32_t));
  return bytes > limits.staged_bytes ? 0 : static_cast<int32_t>(words);
}

inline GroupPlan plan_group(const FrameGroup& group, const PatchOptions& options, const FrameLimits& limits,
                            const uint32_t* table, Carver memory) {
  const FrameJob& job = group.job;
  GroupPlan plan{};
  plan.across = {job.width, job.out_width};
  plan.down = {job.height, job.out_height};
  const auto weights_of = [&memory](const BicubicAxis& axis) {
    if (axis.in == axis.out) return AxisTable{nullptr, nullptr, 0};
    auto* const windows = memory.take<TapWindow>(axis.out);
    return AxisTable{windows, memory.take<int32_t>(axis.most_taps() * axis.out), axis.out};
  };
  plan.across_table = weights_of(plan.across);
  plan.down_table = weights_of(plan.down);

  std::vector<Pass> passes;
  if (plan.across_table.out != 0) passes.push_back(Pass::across);
  if (plan.down_table.out != 0) passes.push_back(Pass::down);
  if (passes.empty()) passes.push_back(Pass::none);
  if (vertical_first(job.height, job.width, job.out_height, job.out_width)) std::reverse(passes.begin(), passes.end());

  const int64_t patch_columns = options.patch * std::max<int64_t>(kTileColumns / options.patch, 1);
  const bool two = passes.size() == 2;
  Resample common{};
  common.in_width = static_cast<int32_t>(job.width);
  common.channels = static_cast<int32_t>(job.channels);
  common.index = {static_cast<int32_t>(options.patch), static_cast<int32_t>(options.merge),
                  static_cast<int32_t>(job.out_width / options.patch)};
  common.patch_stride = job.patch_stride;
  common.channel_stride = job.channel_stride;
  common.type = options.type;
  common.table = table;
  common.by_patch = SmallDivider::by(options.patch);
  for (size_t n = 0; n < passes.size(); ++n) {
    Step step{passes[n], n == 1, common, 0, 0};
    Resample& r = step.parameters;
    r.to_between = two && n == 0;
    const bool is_across = step.pass == Pass::across;
    r.taps = is_across ? plan.across_table : plan.down_table;
    if (r.to_between) {
      // The second pass reads whole words of the tiles that it makes, if it keeps to the columns.
      const int64_t width = is_across ? job.out_width : job.width, height = is_across ? job.height : job.out_height;
      step.blocks = set_tiles(r, width, height, is_across ? patch_columns : kTileColumns, height);
      common.between_pitch = r.between_pitch = static_cast<int64_t>(r.column_tiles) * r.pitch;
      common.between_frame = r.between_frame = 3 * height * r.between_pitch;
    } else {
      step.blocks = set_tiles(r, job.out_width, job.out_height, patch_columns, options.patch);
      r.by_quads = SmallDivider::by(tiles_of(r.rows * options.patch, 4));
    }
    if (is_across) r.staged_words = staged_words(plan.across, r.columns, limits);
    step.shared_bytes = int64_t{kRowsAtOnce} * r.staged_words * static_cast<int64_t>(sizeof(uint32_t));
    if (!r.to_between && table != nullptr) step.shared_bytes += static_cast<int64_t>(sizeof(ValueTable));
    plan.steps.push_back(step);
  }

  plan.frames = std::min<int64_t>(limits.frames, static_cast<int64_t>(group.places.size()));
  if (two) {
    plan.frames = std::clamp<int64_t>(limits.between_bytes / common.between_frame, 1, plan.frames);
    auto* const between = memory.take<uint8_t>(plan.frames * common.between_frame);
    for (Step& step : plan.steps) step.parameters.between = between;
  }
  plan.bytes = memory.used;
  return plan;
}

inline uint32_t* take_table(Carver& memory, const PatchOptions& options) {
  return options.type == PatchType::uint8 ? nullptr : memory.take<uint32_t>(kTableWords);
}

inline int64_t workspace_bytes(const std::vector<FrameJob>& jobs, const PatchOptions& options,
                               const FrameLimits& limits) {
  Carver memory{0};
  const uint32_t* const table = take_table(memory, options);
  int64_t bytes = memory.used;
  for (const FrameGroup& group : frame_groups(jobs)) {
    bytes = std::max(bytes, plan_group(group, options, limits, table, memory).bytes);
  }
  return bytes;
}

inline ValueTable value_table(const PatchOptions& options) {
  ValueTable table{};
  for (int n = 0; n < kTableWords; ++n) {
    if (options.type == PatchType::float32) {
      std::memcpy(&table.words[n], static_cast<const uint32_t*>(options.table) + n, sizeof(uint32_t));
    } else {
      table.words[n] = static_cast<const uint16_t*>(options.table)[n];
    }
  }
  return table;
}

// launch(kernel, grid, arguments...) in the order of the calls; each kernel sees what those before it wrote, so that
// groups use one workspace after the other. False, and nothing more is launched, where a grid is too large.
template <class Launch>
bool enqueue(const std::vector<FrameJob>& jobs, const PatchOptions& options, const FrameLimits& limits,
             uint8_t* workspace, const Launch& launch) {
  Carver memory{reinterpret_cast<uintptr_t>(workspace)};
  uint32_t* const table = take_table(memory, options);
  if (table != nullptr) launch(place_table, Grid{1, 1, 0}, value_table(options), table);

  for (const FrameGroup& group : frame_groups(jobs)) {
    const GroupPlan plan = plan_group(group, options, limits, table, memory);
    for (const Step& step : plan.steps) {
      if (step.blocks > std::numeric_limits<int32_t>::max()) return false;
    }
    if (plan.weights() != 0) {
      launch(make_weights, Grid{tiles_of(plan.weights(), kPatchThreads), 1, 0}, plan.across, plan.across_table,
             plan.down, plan.down_table);
    }
    const auto count = static_cast<int64_t>(group.places.size());
    for (int64_t begin = 0; begin < count; begin += plan.frames) {
      const Grid frames{0, std::min(plan.frames, count - begin), 0};
      FramePlaces places{};
      std::copy_n(group.places.begin() + begin, frames.frames, places.at);
      for (const Step& step : plan.steps) {
        const Grid grid{step.blocks, frames.frames, step.shared_bytes};
        const Resample& r = step.parameters;
        if (step.pass == Pass::none) {
          launch(resample<Pass::none, Interleaved>, grid, r, places);
        } else if (step.pass == Pass::across) {
          launch(step.from_between ? resample<Pass::across, Planar> : resample<Pass::across, Interleaved>, grid, r,
                 places);
        } else {
          launch(step.from_between ? resample<Pass::down, Planar> : resample<Pass::down, Interleaved>, grid, r, places);
        }
      }
    }
  }
  return true;
}

}  // namespace qwen2vl
