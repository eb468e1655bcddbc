// M-RoPE position arithmetic (Qwen2-VL, arXiv 2409.12191, section 2.1), shared by the CPU loop and the CUDA kernels.
//
// Text advances all three axes together. An image or video of t x h x w merged patches ("item") that starts at s holds
// the positions (s + k, s + i, s + j), and what follows resumes at s + max(t, h, w): an item of n = t*h*w tokens
// shifts the rest of its sequence back by n - max(t, h, w). The position of any token is therefore its index in the
// sequence minus the shifts of the items that end before it, which is what lets a prefix sum replace the walk.
//
// A sequence may come in several calls, cut anywhere: what a call leaves behind (MropeState) is where the next begins.
#pragma once

#include <cstdint>

#include "int_view.h"
#include "macros.h"

namespace qwen2vl {

struct Position {
  int64_t t, h, w;
};

// More tokens than one call may hold.
constexpr int64_t kTooMany = 0x7fffffff;

// Sides of an item in tokens, after spatial merging. A grid that holds nothing is all zeros; a side beyond kTooMany is
// cut there, as no call has the tokens to fill it either way.
struct Extent {
  int64_t t, h, w;

  // Saturates at kTooMany, so that sums over any grids stay clear of overflow.
  QWEN2VL_HD int64_t tokens() const {
    const int64_t frame = h * w < kTooMany ? h * w : kTooMany;
    return t * frame < kTooMany ? t * frame : kTooMany;
  }

  QWEN2VL_HD int64_t longest() const {
    const int64_t hw = h > w ? h : w;
    return t > hw ? t : hw;
  }

  QWEN2VL_HD int64_t shift() const { return tokens() - longest(); }

  // `token` counts from the item's first.
  QWEN2VL_HD Position position(int64_t start, int64_t token) const {
    const auto index = static_cast<int32_t>(token);
    const auto height = static_cast<int32_t>(h), width = static_cast<int32_t>(w);
    const int32_t line = index / width;
    return {start + line / height, start + line % height, start + index % width};
  }
};

// Where a sequence stands between two calls. Kept by the caller as kStateSize numbers in the order of the members.
struct MropeState {
  int64_t start = 0;     // position of the next token, or of the first token of the open item
  int64_t kept = 0;      // unmasked tokens gone by
  int64_t modality = 0;  // of the item that the cut went through: 1 image, 2 video; 0: none is open
  int64_t inside = 0;    // its placeholders gone by
  Extent item{0, 0, 0};

  QWEN2VL_HD int64_t remaining() const { return item.tokens() - inside; }

  // Of `placeholders` of one modality (0 image, 1 video) that follow, those that belong to the open item.
  QWEN2VL_HD int64_t carried(int which, int64_t placeholders) const {
    if (modality != which + 1) return 0;
    return placeholders < remaining() ? placeholders : remaining();
  }

  // Largest position + 1 - number of kept tokens; the open item counts as if it were complete.
  QWEN2VL_HD int64_t delta() const { return start + item.longest() - (kept + remaining()); }

  // Whether a call may have left it. The bounds keep every sum clear of overflow.
  QWEN2VL_HD bool sound() const {
    constexpr int64_t far = int64_t{1} << 61;
    if (start < -far || start > far || kept < 0 || kept > far) return false;
    if (modality == 0) return inside == 0 && item.t == 0 && item.h == 0 && item.w == 0;
    return (modality == 1 || modality == 2) && item.t > 0 && item.t <= kTooMany && item.h > 0 && item.h <= kTooMany &&
           item.w > 0 && item.w <= kTooMany && inside > 0 && inside < item.tokens();
  }

  QWEN2VL_HD void store(int64_t* out) const {
    const int64_t values[] = {start, kept, modality, inside, item.t, item.h, item.w};
    for (const int64_t value : values) *out++ = value;
  }
};

constexpr int64_t kStateSize = 7;

struct MropeInput {
  IntView ids;          // (rows, columns)
  IntView mask;         // (rows, columns), zero drops a token; may be null
  IntView image_grids;  // (images, 3): t, h, w in patches, before merging
  IntView video_grids;  // (videos, 3)
  IntView cu_seqlens;   // (sequences + 1), with rows == 1; null: one sequence per row
  int64_t rows, columns, images, videos, sequences;
  int64_t image_token, video_token, merge_size;
  IntView state{nullptr, 8, 0, 0};  // (sequences, kStateSize); null: every sequence begins here

  QWEN2VL_HD int64_t tokens() const { return rows * columns; }

  // First token of a sequence; boundaries outside of the tokens are pulled to the nearest end.
  QWEN2VL_HD int64_t begin(int64_t sequence) const {
    if (!cu_seqlens.given()) return sequence * columns;
    const int64_t at = cu_seqlens.at(sequence);
    return at < 0 ? 0 : at > columns ? columns : at;
  }

  // Token indices stay below 2^31 (the bindings check it): 32-bit division is several times cheaper on a GPU.
  QWEN2VL_HD int64_t row(int64_t token) const { return static_cast<int32_t>(token) / static_cast<int32_t>(columns); }

  QWEN2VL_HD int64_t at(const IntView& view, int64_t token) const {
    const int64_t r = row(token);
    return view.at(r, token - r * columns);
  }

  QWEN2VL_HD int64_t id(int64_t token) const { return at(ids, token); }

  QWEN2VL_HD MropeState before(int64_t sequence) const {
    if (!state.given()) return {};
    const auto value = [&](int64_t n) { return state.at(sequence, n); };
    MropeState out;
    out.start = value(0);
    out.kept = value(1);
    out.modality = value(2);
    out.inside = value(3);
    out.item = {value(4), value(5), value(6)};
    return out;
  }

  // Tokens outside of every packed sequence count as masked.
  QWEN2VL_HD bool kept(int64_t token) const {
    if (cu_seqlens.given() && (token < begin(0) || token >= begin(sequences))) return false;
    return !mask.given() || at(mask, token) != 0;
  }
};

QWEN2VL_HD inline Extent extent(const IntView& grids, int64_t item, int64_t merge_size) {
  const int64_t t = grids.at(item, 0), h = grids.at(item, 1) / merge_size, w = grids.at(item, 2) / merge_size;
  if (t < 1 || h < 1 || w < 1) return {0, 0, 0};
  return {t < kTooMany ? t : kTooMany, h < kTooMany ? h : kTooMany, w < kTooMany ? w : kTooMany};
}

// Number of entries of the ascending `values` that are <= value.
template <class T>
QWEN2VL_HD inline int64_t count_up_to(const T* values, int64_t size, int64_t value) {
  int64_t low = 0;
  while (low < size) {
    const int64_t middle = low + (size - low) / 2;
    if (values[middle] <= value) {
      low = middle + 1;
    } else {
      size = middle;
    }
  }
  return low;
}

// How many kept tokens, image placeholders and video placeholders stand before a token of the flattened batch.
struct Counts {
  int32_t kept, image, video;

  QWEN2VL_HD int64_t of(int which) const { return which == 0 ? image : video; }
};

// Prefix sums over the items of one modality.
struct ItemSums {
  const int64_t* ends;    // (items): placeholders up to and including each item
  const int64_t* shifts;  // (items + 1): shift of all items before each one
  int64_t items;

  // Items that are complete once `placeholders` of them have gone by.
  QWEN2VL_HD int64_t complete(int64_t placeholders) const { return count_up_to(ends, items, placeholders); }

  QWEN2VL_HD int64_t first_placeholder(int64_t item) const { return item > 0 ? ends[item - 1] : 0; }

  // Whether `placeholders` of them end inside of the item that follows the `done` complete ones.
  QWEN2VL_HD bool open(int64_t done, int64_t placeholders) const {
    return done < items && placeholders > first_placeholder(done);
  }
};

struct MropeSums {
  const Counts* counts;  // (tokens + 1)
  ItemSums image, video;
  const int64_t* bases;  // (sequences, 2), from place_items; null where no sequence is cut

  // A copy, as an array indexed at run time would live in local memory.
  QWEN2VL_HD ItemSums items(int which) const { return which == 0 ? image : video; }
};

// A sequence that is cut leaves an item incomplete, and one that goes on begins with placeholders of an item that is
// not in this call: a count of placeholders then is no rank among those of the items. What has to be added to it, for
// one modality and every sequence, is written to bases[2 * sequence + which].
QWEN2VL_HD inline void place_items(const MropeInput& in, const MropeSums& sums, int which, int64_t* bases) {
  const ItemSums items = sums.items(which);
  int64_t next = 0;  // the first item that has not begun
  for (int64_t sequence = 0; sequence < in.sequences; ++sequence) {
    const int64_t from = sums.counts[in.begin(sequence)].of(which);
    const int64_t to = sums.counts[in.begin(sequence + 1)].of(which);
    const int64_t seen = to > from ? to - from : 0;
    const MropeState before = in.before(sequence);
    const int64_t own = seen - (before.sound() ? before.carried(which, seen) : 0);
    const int64_t last = items.first_placeholder(next) + own;
    bases[2 * sequence + which] = last - to;
    const int64_t done = items.complete(last);
    next = items.open(done, last) ? done + 1 : done;
  }
}

// Where a sequence stands before the token that `to` counts up to. A placeholder beyond the last grid counts as text,
// and a state that no call can have left as none, so that no input whatever leads to a read outside of the arrays.
QWEN2VL_HD inline MropeState state_at(const MropeInput& in, const MropeSums& sums, int64_t sequence, const Counts& to) {
  const Counts from = sums.counts[in.begin(sequence)];
  MropeState now = in.before(sequence);
  if (!now.sound()) now = {};
  const int open = static_cast<int>(now.modality) - 1;
  const int64_t kept = to.kept - from.kept;
  const int64_t carried = open < 0 ? 0 : now.carried(open, to.of(open) - from.of(open));
  now.kept += kept;
  now.inside += carried;
  if (open >= 0 && now.remaining() > 0) return now;

  now.start += now.item.longest() + kept - carried;
  now.modality = now.inside = 0;
  now.item = {0, 0, 0};
  for (int which = 0; which < 2; ++which) {
    const ItemSums items = sums.items(which);
    const int64_t base = sums.bases == nullptr ? 0 : sums.bases[2 * sequence + which];
    const int64_t first = from.of(which) + (which == open ? carried : 0) + base;
    const int64_t last = to.of(which) + base;
    const int64_t done = items.complete(last);
    now.start -= items.shifts[done] - items.shifts[items.complete(first)];
    if (!items.open(done, last)) continue;
    now.modality = which + 1;
    now.inside = last - items.first_placeholder(done);
    now.item = extent(which == 0 ? in.image_grids : in.video_grids, done, in.merge_size);
    now.start -= now.inside;
  }
  return now;
}

QWEN2VL_HD inline int64_t sequence_of(const MropeInput& in, int64_t token) {
  if (!in.cu_seqlens.given()) return in.row(token);
  int64_t low = 0, high = in.sequences;  // the last sequence that begins at or before the token
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (in.begin(middle + 1) <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Position of one token; masked tokens get zeros. The first token of an item is where text would be.
QWEN2VL_HD inline Position token_position(const MropeInput& in, const MropeSums& sums, int64_t token) {
  if (!in.kept(token)) return {0, 0, 0};
  const MropeState now = state_at(in, sums, sequence_of(in, token), sums.counts[token]);
  const int64_t id = in.id(token);
  const bool goes_on = now.modality == 1 ? id == in.image_token : now.modality == 2 && id == in.video_token;
  if (!goes_on) return {now.start, now.start, now.start};
  return now.item.position(now.start, now.inside);
}

QWEN2VL_HD inline MropeState state_after(const MropeInput& in, const MropeSums& sums, int64_t sequence) {
  return state_at(in, sums, sequence, sums.counts[in.begin(sequence + 1)]);
}

}  // namespace qwen2vl
