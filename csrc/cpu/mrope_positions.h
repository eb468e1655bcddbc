#pragma once

#include <cstdint>

#include "../common/mrope.h"

namespace qwen2vl {

enum class MropeError : int64_t {
  none = 0,
  grid_entry,       // a grid entry is smaller than one
  grid_not_merged,  // height or width is no multiple of the merge size
  no_grid,          // a placeholder has no grid left
  interrupted,      // another token stands inside of an item
  cut,              // a sequence ends inside of an item
  unused_grid,      // placeholders ran out before the grids did
  state,            // a state that no call can have left
};

// What went wrong and where; the Python side words it. `item` counts within its modality and is -1 for the item that a
// state has open; for a state it is the sequence. `token` counts in the flattened batch, `found` is the number of the
// item's placeholders seen.
struct MropeStatus {
  MropeError error;
  bool video;
  int64_t item, token, found;
};

// positions: (3, rows, columns); delta: (sequences); state: (sequences, kStateSize), or null where no sequence may be
// cut. All are written in full unless an error is returned.
MropeStatus mrope_positions(const MropeInput& in, int64_t* positions, int64_t* delta, int64_t* state);

}  // namespace qwen2vl
