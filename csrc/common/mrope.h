// M-RoPE position arithmetic (Qwen2-VL, arXiv 2409.12191, section 2.1), shared by the CPU loop and the CUDA kernels.
//
// Text advances all three axes together. An image or video of t x h x w merged patches ("item") that starts at s holds
// the positions (s + k, s + i, s + j), and what follows resumes at s + max(t, h, w): an item of n = t*h*w tokens
// shifts the rest of its sequence back by n - max(t, h, w). The position of any token is therefore its index in the
// sequence minus the shifts of the items that end before it, which is what lets a prefix sum replace the walk.
#pragma once

#include <cstdint>

#include "int_view.h"
#include "macros.h"

namespace qwen2vl {

struct MropeInput {
  IntView ids;          // (rows, columns)
  IntView mask;         // (rows, columns), zero drops a token; may be null
  IntView image_grids;  // (images, 3): t, h, w in patches, before merging
  IntView video_grids;  // (videos, 3)
  IntView cu_seqlens;   // (sequences + 1), with rows == 1; null: one sequence per row
  int64_t rows, columns, images, videos, sequences;
  int64_t image_token, video_token, merge_size;

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

  // Tokens outside of every packed sequence count as masked.
  QWEN2VL_HD bool kept(int64_t token) const {
    if (cu_seqlens.given() && (token < begin(0) || token >= begin(sequences))) return false;
    return !mask.given() || at(mask, token) != 0;
  }
};

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
};

// Prefix sums over the items of one modality.
struct ItemSums {
  const int64_t* ends;    // (items): placeholders up to and including each item
  const int64_t* shifts;  // (items + 1): shift of all items before each one
  int64_t items;

  // Items that are complete once `placeholders` of them have gone by.
  QWEN2VL_HD int64_t complete(int64_t placeholders) const { return count_up_to(ends, items, placeholders); }

  QWEN2VL_HD int64_t first_placeholder(int64_t item) const { return item > 0 ? ends[item - 1] : 0; }
};

struct MropeSums {
  const Counts* counts;  // (tokens + 1)
  ItemSums image, video;

  // Shift that the items completed between two tokens of one sequence add up to.
  QWEN2VL_HD int64_t shift(const Counts& from, const Counts& to) const {
    return image.shifts[image.complete(to.image)] - image.shifts[image.complete(from.image)] +
           video.shifts[video.complete(to.video)] - video.shifts[video.complete(from.video)];
  }
};

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

// Position of one token from the prefix sums; masked tokens get zeros. A placeholder beyond the last grid is placed as
// if it were text, so that no input whatever leads to a read outside of the arrays.
QWEN2VL_HD inline Position token_position(const MropeInput& in, const MropeSums& sums, int64_t token) {
  if (!in.kept(token)) return {0, 0, 0};
  const Counts from = sums.counts[in.begin(sequence_of(in, token))];
  const Counts to = sums.counts[token];
  const int64_t start = (to.kept - from.kept) - sums.shift(from, to);
  const int64_t id = in.id(token);
  const bool video = id == in.video_token;
  if (!video && id != in.image_token) return {start, start, start};
  const ItemSums& items = video ? sums.video : sums.image;
  const int64_t rank = video ? to.video : to.image;
  const int64_t item = items.complete(rank);
  if (item >= items.items) return {start, start, start};
  const int64_t inside = rank - items.first_placeholder(item);
  return extent(video ? in.video_grids : in.image_grids, item, in.merge_size).position(start - inside, inside);
}

// Largest position + 1 - number of kept tokens of a sequence, which is minus the shift of all its items.
QWEN2VL_HD inline int64_t sequence_delta(const MropeInput& in, const MropeSums& sums, int64_t sequence) {
  return -sums.shift(sums.counts[in.begin(sequence)], sums.counts[in.begin(sequence + 1)]);
}

}  // namespace qwen2vl
