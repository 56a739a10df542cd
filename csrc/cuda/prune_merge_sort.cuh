// The sort step of prune_merge and masked_prune_merge.
#pragma once

#include "cuda/prune_merge_image.cuh"

namespace diffrate::cuda {

// Fills token.order, unless it came with the launch.
template <class T, Reading kReading>
__device__ void sort_image(const ImageBlock<T, kReading>& block) {
  const PruneMergeArgs& a = block.a;
  if (a.tokens > kNearTokens) return;
  int patches = static_cast<int>(a.tokens - a.prefix);
  for (int j = static_cast<int>(threadIdx.x); j < patches; j += kPruneMergeThreads)
    block.memory.keys[j] = key_at<Wide<T>>(a.importance, block.image, j);
  for (int j = static_cast<int>(threadIdx.x); j < a.prefix; j += kPruneMergeThreads) block.token.order[j] = j;
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x); j < patches; j += kPruneMergeThreads)
    block.token.order[a.prefix + rank_of(block.memory.keys, patches, j)] = static_cast<int32_t>(a.prefix + j);
  __syncthreads();
}

// Sorts images of more than kNearTokens.
template <class W>
__global__ void __launch_bounds__(kRankingThreads) order_kernel(PruneMergeArgs a, int32_t* order) {
  for_ranked_tokens<W>(a.importance, a.tokens, a.prefix, [&](int64_t image, int64_t token, int64_t position) {
    if (lane_id() == 0) order[image * a.tokens + position] = static_cast<int32_t>(token);
  });
}

}  // namespace diffrate::cuda
