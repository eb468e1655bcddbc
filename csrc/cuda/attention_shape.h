// Sizes of attention's tiles on Hopper, which the kernel, its launcher and the maps of its tensors share.
#pragma once

#include <cstdint>

#include "../common/macros.h"

namespace qwen2vl {

// How heads are laid out unless a configuration says otherwise, which CuTe's layouts confirm: a tile of q, k or v is
// [block][row][columns] in shared memory, swizzled within the rows of a block, and heads end where a block does, but
// for those of 72, behind which are zeros.
constexpr int attention_columns(int head) { return head % 64 == 0 ? 64 : head % 32 == 0 ? 32 : 16; }
constexpr int attention_across(int head) { return (head + 15) / 16 * 16; }

// A program of attention for heads of one width. `consumers` warpgroups of 64 queries each take `keys` keys a step;
// `share` eighths of the exponentials are polynomials on the units that multiply and add; the softmax's weights go to
// the second product through shared memory where `p_shared`, which leaves registers for more keys, else through
// registers.
struct AttentionShape {
  int head, consumers, keys, share;
  bool p_shared;
  int columns, across;

  QWEN2VL_HD constexpr int rows() const { return 64 * consumers; }  // queries of a tile
  QWEN2VL_HD constexpr int row_bytes() const { return 2 * columns; }
  QWEN2VL_HD constexpr int group_bytes() const { return 8 * row_bytes(); }  // of 8 rows, one atom of the swizzle
  QWEN2VL_HD constexpr int blocks() const { return (head + columns - 1) / columns; }
  QWEN2VL_HD constexpr int width() const { return blocks() * columns; }  // of a tile, zeros behind the head included
  QWEN2VL_HD constexpr int depth() const { return (head + 15) / 16; }    // steps of q k^T
  QWEN2VL_HD constexpr int stages() const { return 2; }  // tiles of keys, and of values, in flight or in use
  QWEN2VL_HD constexpr int threads() const { return 128 * (consumers + 1); }
  // A multiprocessor has 65536 registers, and setmaxnreg deals them out: what the producer does not need is the
  // consumers'.
  QWEN2VL_HD constexpr int producer_registers() const { return consumers == 3 ? 32 : 24; }
  QWEN2VL_HD constexpr int consumer_registers() const { return consumers == 3 ? 160 : 240; }

  QWEN2VL_HD constexpr int q_bytes() const { return rows() * width() * 2; }
  QWEN2VL_HD constexpr int key_bytes() const { return keys * width() * 2; }
  QWEN2VL_HD constexpr int p_bytes() const { return p_shared ? 64 * keys * 2 : 0; }  // of one consumer
  // Results pass through shared memory on their way out; an odd number of 16 bytes keeps 8 rows in different banks.
  QWEN2VL_HD constexpr int out_pitch() const { return 16 * (head / 8 | 1); }
  QWEN2VL_HD constexpr int out_bytes() const { return 16 * out_pitch(); }  // of one warp

  // Where a tile's operand of wgmma begins, 16 columns or 16 rows a step, and how far apart the tile's blocks are.
  QWEN2VL_HD constexpr int depth_at(int tile_rows, int step) const {
    return 16 * step / columns * block_bytes(tile_rows) + 32 * step % row_bytes();
  }
  QWEN2VL_HD constexpr int across_at(int step) const { return 2 * step * group_bytes(); }
  QWEN2VL_HD constexpr int block_bytes(int tile_rows) const { return tile_rows * row_bytes(); }

  // Offsets in shared memory.
  QWEN2VL_HD constexpr int q_at() const { return 0; }
  QWEN2VL_HD constexpr int k_at() const { return q_at() + q_bytes(); }
  QWEN2VL_HD constexpr int v_at() const { return k_at() + stages() * key_bytes(); }
  QWEN2VL_HD constexpr int p_at() const { return v_at() + stages() * key_bytes(); }
  QWEN2VL_HD constexpr int out_at() const { return p_at() + consumers * p_bytes(); }
  QWEN2VL_HD constexpr int tile_at() const { return out_at() + 4 * consumers * out_bytes(); }
  QWEN2VL_HD constexpr int barriers_at() const { return tile_at() + 32; }
  QWEN2VL_HD constexpr int shared_bytes() const { return barriers_at() + (8 * (3 + 4 * stages()) + 15) / 16 * 16; }

  QWEN2VL_HD constexpr bool valid() const {
    const bool known = head == 64 || head == 72 || head == 80 || head == 96 || head == 128;
    const bool laid_out =
        (columns == 16 || columns == 32 || columns == 64) && across >= head && across <= width() && across % 8 == 0;
    return known && laid_out && consumers >= 1 && consumers <= 3 && keys >= 16 && keys % 16 == 0 && share >= 0 &&
           share <= 8 && shared_bytes() <= 227 * 1024;
  }
};

// A shape as a type, for templates.
template <int Head, int Consumers, int Keys, int Share = 0, bool PShared = false, int Columns = attention_columns(Head),
          int Across = attention_across(Head)>
struct AttentionConfig {
  static constexpr AttentionShape kShape{Head, Consumers, Keys, Share, PShared, Columns, Across};
  static_assert(kShape.valid());
};

// What a launch works on. Tiles are (first row, begin and end of the keys' segment), and the end of the queries'
// segment where that is another one; they are sorted by the number of keys, the most first, and zeros are no tile.
struct AttentionWork {
  const int32_t* tiles;  // (count, width)
  int32_t count, width;
  int32_t least, most;  // this launch takes the segments of least < keys <= most
  int32_t heads, group;
  uint16_t* out;  // (rows, heads, columns), contiguous
  float* lse;     // (heads, rows), or null
  int64_t rows;
  float scale;  // of the scores, in powers of two
};

}  // namespace qwen2vl
