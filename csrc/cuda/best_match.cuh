// The best destination that was found for a token.
#pragma once

#include "cuda/common.cuh"

namespace diffrate::cuda {

// The largest cosine, and the position of the destination that has it; of equal ones the first. -1: none.
template <class W>
struct Best {
  W cosine;
  int32_t position;

  __device__ void take_better(Best other) {
    // a NaN is never larger, and what is similar to nothing has no destination
    bool first = other.cosine == cosine && other.position >= 0 && (position < 0 || other.position < position);
    if (other.cosine > cosine || first) *this = other;
  }
  __device__ void take_better_of_lane(int offset) {
    W other = __shfl_xor_sync(kAllLanes, cosine, offset);
    take_better({other, __shfl_xor_sync(kAllLanes, position, offset)});
  }
};

}  // namespace diffrate::cuda
