// The positions of common/kept_numbers.h, read on the device: of masked_prune_merge, forward and backward.
#pragma once

#include "common/kept_numbers.h"
#include "cuda/common.cuh"

namespace diffrate::cuda {

// There must be an image.
template <class W, class Args>
__device__ KeptPositions read_positions(const Args& a) {
  W alive = 0;  // every warp sums for itself
  for (int64_t j = lane_id(); j < a.tokens; j += kWarp) alive += number_of<W>(a.mask, 0, j);
  return kept_positions(warp_sum(alive), *static_cast<const W*>(a.kept_p), *static_cast<const W*>(a.kept_m), a.tokens,
                        a.prefix);
}

}  // namespace diffrate::cuda
