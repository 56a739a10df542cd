// The sort step of prune_merge and masked_prune_merge.
#pragma once

#include "cuda/prune_merge_image.cuh"

namespace diffrate::cuda {

// Fills token.order and token.size, unless there are too many tokens: then the launch came with the order.
template <class T, Reading kReading>
__device__ void sort_image(const ImageBlock<T, kReading>& block) {
  using W = Wide<T>;
  const PruneMergeArgs& a = block.a;
  if (a.tokens > kNearTokens) return;
  auto key_of = [&](int64_t patch) {
    if constexpr (std::is_same_v<W, float>)
      return AskedKey(a.importance, block.image, patch, true).key();
    else
      return key_at<W>(a.importance, block.image, patch);
  };
  int tokens = static_cast<int>(a.tokens), prefix = static_cast<int>(a.prefix), patches = tokens - prefix;
  for (int j = static_cast<int>(threadIdx.x); j < prefix + padded_keys(patches); j += kPruneMergeThreads) {
    W size = j < tokens ? size_of<W>(a.size, block.image, j) : W(1);  // asked for first: a key waits for its importance
    if (j >= prefix)
      block.memory.keys[j - prefix] = j < tokens ? before_padding(key_of(j - prefix)) : kPaddingKey<KeyOf<W>>;
    if (j < tokens) block.token.size[j] = size;
    if (j < prefix) block.token.order[j] = j;
  }
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x); j < patches; j += kPruneMergeThreads)
    block.token.order[prefix + rank_of<1>(block.memory.keys, patches, j)] = prefix + j;
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
