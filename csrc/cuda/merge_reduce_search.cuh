// Mean of the tokens that share a destination, of images too large to be sorted in shared memory: a warp for each
// destination finds its tokens by looking at all of the image, 32 at a time.
#pragma once

#include "cuda/common.cuh"

namespace diffrate::cuda {

constexpr int kSearchThreads = 256;

// Calls body(token), by a whole warp, for each token that goes to `to`, in ascending order.
template <class Body>
__device__ void for_members(const MergeReduceArgs& a, int64_t image, int64_t to, Body body) {
  for (int64_t first = 0; first < a.tokens; first += kWarp) {
    int64_t token = first + lane_id();
    bool member = token < a.tokens && a.dst[image * a.dst_stride_image + token * a.dst_stride_token] == to;
    unsigned left = __ballot_sync(kAllLanes, member);
    for (; left != 0; left &= left - 1) body(first + __ffs(left) - 1);
  }
}

template <class T>
__global__ void __launch_bounds__(kSearchThreads) merge_reduce_search_kernel(MergeReduceArgs a, bool aligned) {
  using W = Wide<T>;
  constexpr int kCount = Chunk<T>::kCount;
  int64_t row = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_id();
  if (row >= a.images * a.kept) return;
  int64_t image = row / a.kept, to = row % a.kept;
  W total = 0;
  for_members(a, image, to, [&](int64_t token) { total += size_of<W>(a.weights, image, token); });
  T* out = static_cast<T*>(a.out) + row * a.channels;
  // all lanes take part in each step: looking for members is the warp's work
  for (int64_t first = 0; first < a.channels; first += kWarp * kCount) {
    int64_t c = first + lane_id() * kCount;
    W sum[kCount] = {};
    for_members(a, image, to, [&](int64_t token) {
      Chunk<T> x = load_chunk(row_of<T>(a.x, image, token), c, a.channels, aligned);
      if (a.residual.data != nullptr)
        x = sum_of(x, load_chunk(row_of<T>(a.residual, image, token), c, a.channels, aligned));
      W weight = size_of<W>(a.weights, image, token);
      for (int i = 0; i < kCount; ++i) sum[i] += x[i] * weight;
    });
    for (int i = 0; i < kCount; ++i) sum[i] = total != 0 ? sum[i] / total : W(0);
    store_chunk(Chunk<T>::of(sum), out, c, a.channels, aligned);
  }
}

template <class T>
const char* merge_reduce_search(const MergeReduceArgs& a, bool aligned, Stream stream) {
  constexpr int64_t warps = kSearchThreads / kWarp;
  return launch(merge_reduce_search_kernel<T>, (a.images * a.kept + warps - 1) / warps, kSearchThreads, 0, stream, a,
                aligned);
}

}  // namespace diffrate::cuda
