// Mean of the tokens that share a destination, and its gradient: one warp per row that is written. A warp finds a row's
// tokens by looking at all destinations of the image, 32 at a time: they are few bytes beside the features.
#include "cuda/common.cuh"

namespace diffrate::cuda {
namespace {

constexpr int kThreads = 256;

// The lanes whose token, first + lane, goes to `to`.
__device__ unsigned members(const MergeReduceArgs& a, int64_t image, int64_t first, int64_t to) {
  int64_t token = first + lane_id();
  bool member = token < a.tokens && a.dst[image * a.dst_stride_image + token * a.dst_stride_token] == to;
  return __ballot_sync(kAllLanes, member);
}

// Calls body(token) for each token that goes to `to`, in ascending order.
template <class Body>
__device__ void for_members(const MergeReduceArgs& a, int64_t image, int64_t to, Body body) {
  for (int64_t first = 0; first < a.tokens; first += kWarp)
    for (unsigned left = members(a, image, first, to); left != 0; left &= left - 1) body(first + __ffs(left) - 1);
}

template <class W>
__device__ W total_weight(const MergeReduceArgs& a, int64_t image, int64_t to) {
  W total = 0;
  for_members(a, image, to, [&](int64_t token) { total += size_of<W>(a.weights, image, token); });
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) merge_reduce_kernel(MergeReduceArgs a, bool aligned) {
  using W = Wide<T>;
  constexpr int kCount = Chunk<T>::kCount;
  int64_t row = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_id();
  if (row >= a.images * a.kept) return;
  int64_t image = row / a.kept, to = row % a.kept;
  W total = total_weight<W>(a, image, to);
  T* out = static_cast<T*>(a.out) + row * a.channels;
  // all lanes take part in each step: looking for members is the warp's work
  for (int64_t first = 0; first < a.channels; first += kWarp * kCount) {
    int64_t c = first + lane_id() * kCount;
    W sum[kCount] = {};
    for_members(a, image, to, [&](int64_t token) {
      Chunk<T> x = load_chunk(row_of<T>(a.x, image, token), c, a.channels, aligned);
      W weight = size_of<W>(a.weights, image, token);
      for (int i = 0; i < kCount; ++i) sum[i] += x[i] * weight;
    });
    for (int i = 0; i < kCount; ++i) sum[i] = total != 0 ? sum[i] / total : W(0);
    store_chunk(Chunk<T>::of(sum), out, c, a.channels, aligned);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) merge_reduce_backward_kernel(MergeReduceArgs a, bool aligned) {
  using W = Wide<T>;
  constexpr int kCount = Chunk<T>::kCount;
  int64_t row = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_id();
  if (row >= a.images * a.tokens) return;
  int64_t image = row / a.tokens, token = row % a.tokens;
  int64_t to = a.dst[image * a.dst_stride_image + token * a.dst_stride_token];
  bool inside = to >= 0 && to < a.kept;  // elsewhere it went nowhere, whatever it is
  W total = inside ? total_weight<W>(a, image, to) : W(0);
  W share = total != 0 ? size_of<W>(a.weights, image, token) / total : W(0);
  const T* grad = row_of<T>(a.x, image, inside ? to : 0);
  T* out = static_cast<T*>(a.out) + row * a.channels;
  for (int64_t c = lane_id() * kCount; c < a.channels; c += kWarp * kCount) {
    W part[kCount] = {};
    if (total != 0) {
      Chunk<T> whole = load_chunk(grad, c, a.channels, aligned);
      for (int i = 0; i < kCount; ++i) part[i] = whole[i] * share;
    }
    store_chunk(Chunk<T>::of(part), out, c, a.channels, aligned);
  }
}

const char* run(const MergeReduceArgs& a, int64_t rows, bool backward, void* stream) {
  constexpr int64_t warps = kThreads / kWarp;
  return dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    bool aligned = aligned_rows<T>(a.x.data, a.channels, a.x.stride_image, a.x.stride_token) &&
                   aligned_rows<T>(a.out, a.channels, 0, 0);
    return launch(backward ? merge_reduce_backward_kernel<T> : merge_reduce_kernel<T>, (rows + warps - 1) / warps,
                  kThreads, 0, static_cast<Stream>(stream), a, aligned);
  });
}

}  // namespace

const char* merge_reduce(const MergeReduceArgs& a, const Scratch&, void* stream) {
  return run(a, a.images * a.kept, false, stream);
}

const char* merge_reduce_backward(const MergeReduceArgs& a, const Scratch&, void* stream) {
  return run(a, a.images * a.tokens, true, stream);
}

}  // namespace diffrate::cuda
