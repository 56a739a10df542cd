// Which tokens masked_prune_merge prunes and merges: the one rule of its kernels on CPU and CUDA, forward and backward.
//
//   1. Numbers. `alive` is the sum of the mask of image 0, as of every other image. It and the kept numbers are rounded
//      to the nearest whole number, halves up (away from zero), and clamped to 0 .. tokens. NaN counts as 0.
//   2. Positions, in the sort order:
//        last   = alive
//        middle = max(min(kept_p, last), prefix)
//        kept   = max(min(kept_m, middle), min(prefix + 1, middle))
//   3. The tokens at positions
//        0 .. kept-1        stay; those from `prefix` on are destinations
//        kept .. middle-1   merge: each is a source
//        kept .. last-1     are masked in the result: the sources, and what is pruned
//        last ..            were masked before, and keep their mask.
//
// So numbers that leave nothing to merge into are raised to the smallest valid ones. The CPU operator refuses them
// instead; on CUDA it cannot, as they are on the device.
#pragma once

#include "common/numeric.h"

namespace diffrate {

// Adding a half and cutting off would be wrong next to halves, and where numbers have no halves any more.
template <class W>
DIFFRATE_INLINE int64_t whole_number_of_tokens(W number, int64_t tokens) {
  if (!(number > 0)) return 0;
  if (number >= static_cast<W>(tokens)) return tokens;
  int64_t whole = static_cast<int64_t>(number);
  return number - static_cast<W>(whole) >= W(0.5) ? whole + 1 : whole;
}

struct KeptPositions {
  int64_t last, middle, kept;
};

// Whether the token at this position is merged, and whether it is pruned.
DIFFRATE_INLINE bool merges(const KeptPositions& at, int64_t j) { return j >= at.kept && j < at.middle; }
DIFFRATE_INLINE bool prunes(const KeptPositions& at, int64_t j) { return j >= at.middle && j < at.last; }

template <class W>
DIFFRATE_INLINE KeptPositions kept_positions(W alive, W kept_p, W kept_m, int64_t tokens, int64_t prefix) {
  int64_t last = whole_number_of_tokens(alive, tokens);
  int64_t middle = whole_number_of_tokens(kept_p, tokens), kept = whole_number_of_tokens(kept_m, tokens);
  if (middle > last) middle = last;
  if (middle < prefix) middle = prefix;
  if (kept > middle) kept = middle;
  if (kept < prefix + 1) kept = prefix + 1 < middle ? prefix + 1 : middle;
  return {last, middle, kept};
}

}  // namespace diffrate
