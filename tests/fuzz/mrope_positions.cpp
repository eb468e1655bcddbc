// mrope_positions on ids, masks, grids and boundaries that fit each other, nearly fit, or make no sense. The CPU pass
// is compared with a walk of its own and with the prefix sums that the CUDA kernels use; these sums are also asked
// about boundaries that fall, which reach them unchecked.
#include "cpu/mrope_positions.h"

#include <algorithm>
#include <limits>

#include "driver.h"

namespace {

using fuzz::Buffer;
using qwen2vl::Counts;
using qwen2vl::Extent;
using qwen2vl::IntView;
using qwen2vl::MropeError;
using qwen2vl::MropeInput;
using qwen2vl::MropeStatus;
using qwen2vl::Position;

constexpr int64_t kImage = 7, kVideo = -3, kText = 5;

// A strided view that ends where its buffer does. Strides may be zero: every element is then the last one stored.
struct Stored {
  Buffer buffer;
  IntView view;

  Stored(const std::vector<int64_t>& values, int64_t rows, int64_t columns, int64_t item_size, int64_t row_stride,
         int64_t column_stride)
      : buffer(rows * columns == 0 ? 0 : ((rows - 1) * row_stride + (columns - 1) * column_stride + 1) * item_size),
        view{buffer.data(), item_size, row_stride, column_stride} {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        uint8_t* const at = buffer.data() + (row * row_stride + column * column_stride) * item_size;
        const int64_t value = values[static_cast<size_t>(row * columns + column)];
        std::memcpy(at, &value, static_cast<size_t>(item_size));  // the low bytes
      }
    }
  }
};

Stored store(fuzz::Bytes& bytes, const std::vector<int64_t>& values, int64_t rows, int64_t columns, int64_t item_size) {
  switch (bytes.below(6)) {
    case 0:  // gaps within the rows
      return {values, rows, columns, item_size, 2 * columns + bytes.below(3), 2};
    case 1:  // transposed
      return {values, rows, columns, item_size, 1, rows + bytes.below(3)};
    case 2:  // expanded
      return {values, rows, columns, item_size, 0, 1};
    default:
      return {values, rows, columns, item_size, columns, 1};
  }
}

int64_t any_number(fuzz::Bytes& bytes) {
  using Limits = std::numeric_limits<int64_t>;
  switch (bytes.below(5)) {
    case 0:
      return bytes.pick({0, -1, Limits::max(), Limits::min(), 1 << 30, 0x7fffffff, -0x7fffffff - 1, int64_t{1} << 32});
    case 1:
      return bytes.take<int64_t>();
    default:
      return bytes.below(9);
  }
}

std::vector<int64_t> make_grids(fuzz::Bytes& bytes, int64_t count, int64_t merge, bool sensible) {
  std::vector<int64_t> grids;
  for (int64_t item = 0; item < count; ++item) {
    if (!sensible && bytes.below(4) == 0) {
      for (int side = 0; side < 3; ++side) grids.push_back(any_number(bytes));
    } else {
      grids.insert(grids.end(), {1 + bytes.below(3), merge * (1 + bytes.below(4)), merge * (1 + bytes.below(4))});
    }
  }
  return grids;
}

// Text and whole items in turn, as far as there is room; now and then a token is changed.
std::vector<int64_t> make_ids(fuzz::Bytes& bytes, int64_t tokens, const std::vector<int64_t>* grids, int64_t merge,
                              bool sensible) {
  std::vector<int64_t> ids;
  size_t used[2] = {0, 0};
  while (static_cast<int64_t>(ids.size()) < tokens) {
    const int video = bytes.flag() ? 1 : 0;
    const size_t item = used[video];
    if (bytes.below(3) != 0 && 3 * item < grids[video].size()) {
      const int64_t* const g = grids[video].data() + 3 * item;
      const bool small = std::all_of(g, g + 3, [](int64_t side) { return side > 0 && side < 64; });
      const int64_t size = small ? g[0] * (g[1] / merge) * (g[2] / merge) : bytes.below(40);
      const int64_t room = tokens - static_cast<int64_t>(ids.size());
      ids.insert(ids.end(), static_cast<size_t>(std::min(size, room)), video ? kVideo : kImage);
      ++used[video];
    } else {
      ids.insert(ids.end(), static_cast<size_t>(std::min<int64_t>(1 + bytes.below(6), tokens)), kText);
    }
  }
  ids.resize(static_cast<size_t>(tokens));
  if (!sensible && tokens > 0) {
    for (int64_t n = bytes.below(4); n > 0; --n) {
      ids[static_cast<size_t>(bytes.take<uint16_t>() % tokens)] = bytes.pick({kImage, kVideo, kText, 0});
    }
  }
  return ids;
}

// What each token should get, by the definition: a list of kept tokens a sequence, eaten from the front.
bool walk(const MropeInput& in, std::vector<Position>& positions, std::vector<int64_t>& delta) {
  positions.assign(static_cast<size_t>(in.tokens()), Position{0, 0, 0});
  int64_t used[2] = {0, 0};
  const IntView* const grids[2] = {&in.image_grids, &in.video_grids};
  const int64_t counts[2] = {in.images, in.videos};
  for (int video = 0; video < 2; ++video) {
    for (int64_t item = 0; item < counts[video]; ++item) {
      for (int side = 0; side < 3; ++side) {
        const int64_t value = grids[video]->at(item, side);
        if (value < 1 || (side > 0 && value % in.merge_size != 0)) return false;
      }
    }
  }
  for (int64_t sequence = 0; sequence < in.sequences; ++sequence) {
    std::vector<int64_t> slots;
    for (int64_t token = in.begin(sequence); token < in.begin(sequence + 1); ++token) {
      if (!in.mask.given() || in.at(in.mask, token) != 0) slots.push_back(token);
    }
    const auto size = static_cast<int64_t>(slots.size());
    int64_t at = 0, start = 0;
    while (at < size) {
      const int64_t id = in.id(slots[static_cast<size_t>(at)]);
      if (id != in.image_token && id != in.video_token) {
        positions[static_cast<size_t>(slots[static_cast<size_t>(at++)])] = {start, start, start};
        ++start;
        continue;
      }
      const int video = id == in.image_token ? 0 : 1;
      if (used[video] == counts[video]) return false;
      const int64_t t = grids[video]->at(used[video], 0), h = grids[video]->at(used[video], 1) / in.merge_size,
                    w = grids[video]->at(used[video], 2) / in.merge_size;
      ++used[video];
      if (t > size || h > size || w > size || t * h * w > size - at) return false;
      for (int64_t n = 0; n < t * h * w; ++n, ++at) {
        const int64_t token = slots[static_cast<size_t>(at)];
        if (in.id(token) != id) return false;
        positions[static_cast<size_t>(token)] = {start + n / (h * w), start + n / w % h, start + n % w};
      }
      start += std::max({t, h, w});
    }
    delta.push_back(start - size);
  }
  return used[0] == counts[0] && used[1] == counts[1];
}

// The prefix sums by their definition, in buffers without a spare byte.
struct Sums {
  Buffer counts, ends[2], shifts[2];

  explicit Sums(const MropeInput& in)
      : counts((in.tokens() + 1) * static_cast<int64_t>(sizeof(Counts))),
        ends{Buffer(8 * in.images), Buffer(8 * in.videos)},
        shifts{Buffer(8 * in.images + 8), Buffer(8 * in.videos + 8)} {
    auto* const sums = reinterpret_cast<Counts*>(counts.data());
    Counts now{0, 0, 0};
    for (int64_t token = 0; token <= in.tokens(); ++token) {
      sums[token] = now;
      if (token == in.tokens() || !in.kept(token)) continue;
      ++now.kept;
      now.image += in.id(token) == in.image_token;
      now.video += in.id(token) == in.video_token;
    }
    for (int video = 0; video < 2; ++video) {
      int64_t end = 0, shift = 0;
      const int64_t items = video ? in.videos : in.images;
      for (int64_t item = 0; item <= items; ++item) {
        reinterpret_cast<int64_t*>(shifts[video].data())[item] = shift;
        if (item == items) break;
        const Extent e = qwen2vl::extent(video ? in.video_grids : in.image_grids, item, in.merge_size);
        end += e.tokens();
        shift += e.shift();
        reinterpret_cast<int64_t*>(ends[video].data())[item] = end;
      }
    }
  }

  qwen2vl::MropeSums get(const MropeInput& in) const {
    const auto numbers = [](const Buffer& buffer) { return reinterpret_cast<const int64_t*>(buffer.data()); };
    return {reinterpret_cast<const Counts*>(counts.data()),
            {numbers(ends[0]), numbers(shifts[0]), in.images},
            {numbers(ends[1]), numbers(shifts[1]), in.videos},
            nullptr};
  }
};

void check_cpu(const MropeInput& in, const qwen2vl::MropeSums& sums) {
  const Buffer positions(24 * in.tokens()), delta(8 * in.sequences);
  const auto* const got = reinterpret_cast<const int64_t*>(positions.data());
  const auto* const got_delta = reinterpret_cast<const int64_t*>(delta.data());
  const MropeStatus status =
      qwen2vl::mrope_positions(in, const_cast<int64_t*>(got), const_cast<int64_t*>(got_delta), nullptr);

  std::vector<Position> want;
  std::vector<int64_t> want_delta;
  const bool fits = walk(in, want, want_delta);
  fuzz::expect(fits == (status.error == MropeError::none), "an error where none is, or none where one is",
               static_cast<int64_t>(status.error));
  if (!fits) {
    fuzz::expect(status.item >= 0 && status.item <= (status.video ? in.videos : in.images), "item out of range");
    fuzz::expect(status.token >= -1 && status.token <= in.tokens(), "token out of range", status.token);
    return;
  }
  for (int64_t token = 0; token < in.tokens(); ++token) {
    const Position& p = want[static_cast<size_t>(token)];
    fuzz::expect(got[token] == p.t && got[in.tokens() + token] == p.h && got[2 * in.tokens() + token] == p.w,
                 "a position of the CPU pass", token);
    const Position s = qwen2vl::token_position(in, sums, token);
    fuzz::expect(s.t == p.t && s.h == p.h && s.w == p.w, "a position from the prefix sums", token);
  }
  for (int64_t n = 0; n < in.sequences; ++n) {
    fuzz::expect(got_delta[n] == want_delta[static_cast<size_t>(n)], "a delta of the CPU pass", n);
    fuzz::expect(qwen2vl::state_after(in, sums, n).delta() == got_delta[n], "a delta from the prefix sums", n);
  }
}

// The same call cut in two at every row's or segment's own place: the same positions, deltas and no word of an error,
// from the CPU pass and from the prefix sums.
void check_chunks(const MropeInput& whole, fuzz::Bytes& bytes) {
  std::vector<Position> want;
  std::vector<int64_t> want_delta;
  if (!walk(whole, want, want_delta)) return;
  std::vector<int64_t> cuts;
  for (int64_t sequence = 0; sequence < whole.sequences; ++sequence) {
    const int64_t size = whole.begin(sequence + 1) - whole.begin(sequence);
    cuts.push_back(whole.begin(sequence) + bytes.below(size + 1));
  }
  // Items that begin before the cut of their sequence; the parts of all sequences are laid end to end.
  std::vector<int64_t> state(static_cast<size_t>(qwen2vl::kStateSize * whole.sequences), 0);
  int64_t used[2] = {0, 0};
  std::vector<int64_t> begun[2][2];
  const IntView* const grids[2] = {&whole.image_grids, &whole.video_grids};
  for (int64_t sequence = 0; sequence < whole.sequences; ++sequence) {
    int64_t left = 0;
    for (int64_t token = whole.begin(sequence); token < whole.begin(sequence + 1); ++token) {
      const int64_t id = whole.id(token);
      if (!whole.kept(token) || (id != whole.image_token && id != whole.video_token)) continue;
      if (left-- > 0) continue;
      const int video = id == whole.image_token ? 0 : 1;
      const Extent e = qwen2vl::extent(*grids[video], used[video], whole.merge_size);
      left = e.tokens() - 1;
      std::vector<int64_t>& to = begun[token < cuts[static_cast<size_t>(sequence)] ? 0 : 1][video];
      for (int side = 0; side < 3; ++side) to.push_back(grids[video]->at(used[video], side));
      ++used[video];
    }
  }
  for (int part = 0; part < 2; ++part) {
    std::vector<int64_t> part_ids, part_mask, bounds{0}, tokens;
    for (int64_t sequence = 0; sequence < whole.sequences; ++sequence) {
      const int64_t cut = cuts[static_cast<size_t>(sequence)];
      const int64_t first = part == 0 ? whole.begin(sequence) : cut, last = part == 0 ? cut : whole.begin(sequence + 1);
      for (int64_t token = first; token < last; ++token) {
        tokens.push_back(token);
        part_ids.push_back(whole.id(token));
        part_mask.push_back(whole.mask.given() ? whole.at(whole.mask, token) : 1);
      }
      bounds.push_back(static_cast<int64_t>(tokens.size()));
    }
    const auto size = static_cast<int64_t>(tokens.size());
    MropeInput in = whole;
    in.ids = {part_ids.data(), 8, 0, 1};
    if (whole.mask.given()) in.mask = {part_mask.data(), 8, 0, 1};
    in.image_grids = {begun[part][0].data(), 8, 3, 1};
    in.video_grids = {begun[part][1].data(), 8, 3, 1};
    in.cu_seqlens = {bounds.data(), 8, 0, 1};
    in.rows = 1;
    in.columns = size;
    in.images = static_cast<int64_t>(begun[part][0].size()) / 3;
    in.videos = static_cast<int64_t>(begun[part][1].size()) / 3;
    in.state = {state.data(), 8, qwen2vl::kStateSize, 1};
    std::vector<int64_t> got(tokens.size() * 3), delta(cuts.size()), after(state.size()), bases(2 * cuts.size());
    const MropeStatus status = qwen2vl::mrope_positions(in, got.data(), delta.data(), after.data());
    fuzz::expect(status.error == MropeError::none, "a chunk is refused", static_cast<int64_t>(status.error));
    const Sums owned(in);
    qwen2vl::MropeSums sums = owned.get(in);
    for (int which = 0; which < 2; ++which) qwen2vl::place_items(in, sums, which, bases.data());
    sums.bases = bases.data();
    for (int64_t n = 0; n < size; ++n) {
      const Position& p = want[static_cast<size_t>(tokens[static_cast<size_t>(n)])];
      const int64_t* const g = got.data() + n;
      fuzz::expect(g[0] == p.t && g[size] == p.h && g[2 * size] == p.w, "a position of a chunk, CPU pass", n);
      const Position s = qwen2vl::token_position(in, sums, n);
      fuzz::expect(s.t == p.t && s.h == p.h && s.w == p.w, "a position of a chunk, prefix sums", n);
    }
    for (int64_t n = 0; n < in.sequences; ++n) {
      int64_t summed[qwen2vl::kStateSize];
      qwen2vl::state_after(in, sums, n).store(summed);
      fuzz::expect(std::equal(summed, summed + qwen2vl::kStateSize, after.data() + qwen2vl::kStateSize * n),
                   "a state from the prefix sums", n);
      if (part == 1) fuzz::expect(delta[static_cast<size_t>(n)] == want_delta[static_cast<size_t>(n)], "a delta", n);
    }
    state = after;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  const bool sensible = bytes.flag(), packed = bytes.flag();
  const int64_t merge =
      sensible ? bytes.pick({2, 1, 3}) : bytes.pick({2, 1, 5, 0x7fffffff, std::numeric_limits<int64_t>::max()});
  const int64_t small = merge < 6 ? merge : 2;
  const int64_t rows = packed ? 1 : bytes.below(4), columns = bytes.below(5) == 0 ? bytes.below(3) : bytes.below(400);
  const int64_t images = bytes.below(5), videos = bytes.below(4);
  const std::vector<int64_t> grids[2] = {make_grids(bytes, images, small, sensible),
                                         make_grids(bytes, videos, small, sensible)};
  const int64_t grid_size = bytes.pick({8, 4}), id_size = bytes.pick({8, 4});
  const std::vector<int64_t> ids = make_ids(bytes, rows * columns, grids, small, sensible);

  const bool masked = bytes.below(3) == 0;
  std::vector<int64_t> mask(ids.size(), 1);
  for (int64_t n = bytes.below(8); n > 0 && !mask.empty(); --n) mask[bytes.take<uint16_t>() % mask.size()] = 0;
  if (masked && bytes.flag()) std::fill(mask.begin(), mask.end(), bytes.pick({0, 1, 255}));

  // As Python lets them pass to the CPU: from 0, never falling, up to the number of tokens.
  const int64_t sequences = packed ? bytes.below(6) : rows;
  std::vector<int64_t> bounds(static_cast<size_t>(packed ? sequences + 1 : 0), 0);
  for (size_t n = 1; n < bounds.size(); ++n) bounds[n] = bytes.below(static_cast<int64_t>(columns) + 1);
  std::sort(bounds.begin(), bounds.end());
  if (packed && bytes.flag()) bounds.back() = sequences > 0 ? columns : 0;
  std::vector<int64_t> wild = bounds;  // as they may reach a GPU
  for (int64_t& bound : wild) bound = bytes.flag() ? bound : static_cast<int32_t>(any_number(bytes));

  const Stored ids_at = store(bytes, ids, rows, columns, id_size);
  const Stored mask_at = store(bytes, mask, rows, columns, bytes.pick({1, 4, 8}));
  const Stored images_at = store(bytes, grids[0], images, 3, grid_size);
  const Stored videos_at = store(bytes, grids[1], videos, 3, grid_size);
  const Stored bounds_at(bounds, 1, static_cast<int64_t>(bounds.size()), 4, 0, 1);
  const Stored wild_at(wild, 1, static_cast<int64_t>(wild.size()), 4, 0, 1);
  const IntView none{nullptr, 1, 0, 0};
  MropeInput in{ids_at.view,
                masked ? mask_at.view : none,
                images > 0 ? images_at.view : none,
                videos > 0 ? videos_at.view : none,
                packed ? bounds_at.view : none,
                rows,
                columns,
                images,
                videos,
                sequences,
                kImage,
                kVideo,
                merge};
  {
    const Sums owned(in);
    check_cpu(in, owned.get(in));
    check_chunks(in, bytes);
  }

  if (packed) in.cu_seqlens = wild_at.view;
  const Sums owned(in);
  const qwen2vl::MropeSums sums = owned.get(in);
  for (int64_t token = 0; token < in.tokens(); ++token) qwen2vl::token_position(in, sums, token);
  for (int64_t n = 0; n < in.sequences; ++n) qwen2vl::state_after(in, sums, n);

  // The same from states of any content, which reach a GPU unchecked.
  std::vector<int64_t> states;
  for (int64_t n = 0; n < in.sequences * qwen2vl::kStateSize; ++n) states.push_back(any_number(bytes));
  in.state = {states.data(), 8, qwen2vl::kStateSize, 1};
  std::vector<int64_t> bases(static_cast<size_t>(2 * in.sequences));
  for (int which = 0; which < 2; ++which) qwen2vl::place_items(in, sums, which, bases.data());
  const qwen2vl::MropeSums placed{sums.counts, sums.image, sums.video, bases.data()};
  for (int64_t token = 0; token < in.tokens(); ++token) qwen2vl::token_position(in, placed, token);
  for (int64_t n = 0; n < in.sequences; ++n) qwen2vl::state_after(in, placed, n).delta();
  return 0;
}
