// One pass over the tokens with running counters. Threads would not pay: 16k tokens take some tens of microseconds.
#include "mrope_positions.h"

#include <algorithm>

namespace qwen2vl {
namespace {

// The grids of one modality, handed out in order of appearance.
struct Items {
  const IntView& grids;
  int64_t count, merge_size;
  bool video;
  int64_t next = 0;

  MropeStatus status(MropeError error, bool carried, int64_t token, int64_t found) const {
    return {error, video, carried ? -1 : next, token, found};
  }

  MropeStatus check() const {
    for (int64_t item = 0; item < count; ++item) {
      const int64_t t = grids.at(item, 0), h = grids.at(item, 1), w = grids.at(item, 2);
      if (t < 1 || h < 1 || w < 1) return {MropeError::grid_entry, video, item, -1, 0};
      if (h % merge_size != 0 || w % merge_size != 0) return {MropeError::grid_not_merged, video, item, -1, 0};
    }
    return {MropeError::none, video, 0, -1, 0};
  }
};

}  // namespace

MropeStatus mrope_positions(const MropeInput& in, int64_t* positions, int64_t* delta, int64_t* state) {
  Items images{in.image_grids, in.images, in.merge_size, false};
  Items videos{in.video_grids, in.videos, in.merge_size, true};
  for (const Items* items : {&images, &videos}) {
    const MropeStatus status = items->check();
    if (status.error != MropeError::none) return status;
  }

  int64_t* const pos_t = positions;
  int64_t* const pos_h = pos_t + in.tokens();
  int64_t* const pos_w = pos_h + in.tokens();
  const auto write = [&](int64_t token, int64_t t, int64_t h, int64_t w) {
    pos_t[token] = t;
    pos_h[token] = h;
    pos_w[token] = w;
  };
  // Tokens outside of every packed sequence.
  if (in.cu_seqlens.given()) {
    for (int64_t token = 0; token < in.begin(0); ++token) write(token, 0, 0, 0);
    for (int64_t token = in.begin(in.sequences); token < in.tokens(); ++token) write(token, 0, 0, 0);
  }

  for (int64_t sequence = 0; sequence < in.sequences; ++sequence) {
    const int64_t first = in.begin(sequence), last = in.begin(sequence + 1);
    const int64_t row = in.cu_seqlens.given() ? 0 : sequence;
    MropeState now = in.before(sequence);
    if (!now.sound()) return {MropeError::state, false, sequence, -1, 0};
    Items* open = now.modality == 0 ? nullptr : now.modality == 1 ? &images : &videos;
    bool carried = open != nullptr;  // the open item began in an earlier call
    Extent e = now.item;
    int64_t k = 0, i = 0, j = 0;  // coordinates within the item
    if (carried) {
      j = now.inside % e.w;
      i = now.inside / e.w % e.h;
      k = now.inside / e.w / e.h;
    }
    for (int64_t token = first; token < last; ++token) {
      const int64_t column = token - row * in.columns;
      if (in.mask.given() && in.mask.at(row, column) == 0) {
        write(token, 0, 0, 0);
        continue;
      }
      ++now.kept;
      const int64_t id = in.ids.at(row, column);
      Items* const items = id == in.image_token ? &images : id == in.video_token ? &videos : nullptr;
      if (open != nullptr && items != open) return open->status(MropeError::interrupted, carried, token, now.inside);
      if (items == nullptr) {
        write(token, now.start, now.start, now.start);
        ++now.start;
        continue;
      }
      if (open == nullptr) {
        if (items->next == items->count) return items->status(MropeError::no_grid, false, token, 0);
        e = extent(items->grids, items->next, in.merge_size);
        open = items;
        now.inside = k = i = j = 0;
      }
      write(token, now.start + k, now.start + i, now.start + j);
      ++now.inside;
      if (++j < e.w) continue;
      j = 0;
      if (++i < e.h) continue;
      i = 0;
      if (++k < e.t) continue;
      now.start += e.longest();
      if (!carried) ++open->next;
      open = nullptr;
      carried = false;
    }
    if (open != nullptr && state == nullptr) return open->status(MropeError::cut, carried, last, now.inside);
    if (open == nullptr) {
      now.modality = now.inside = 0;
      now.item = {0, 0, 0};
    } else {
      now.modality = open == &images ? 1 : 2;
      now.item = e;
      if (!carried) ++open->next;
    }
    delta[sequence] = now.delta();
    if (state != nullptr) now.store(state + kStateSize * sequence);
  }

  for (const Items* items : {&images, &videos}) {
    if (items->next < items->count) return items->status(MropeError::unused_grid, false, -1, 0);
  }
  return {MropeError::none, false, 0, -1, 0};
}

}  // namespace qwen2vl
