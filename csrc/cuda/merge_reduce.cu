// Mean of the tokens that share a destination, and its gradient: one block per row that is written.
#include "cuda/common.cuh"

namespace diffrate::cuda {
namespace {

// A destination outside [0, kept) receives nothing and gives nothing, whatever it is.
__device__ int64_t destination(const MergeReduceArgs& a, int64_t image, int64_t token) {
  int64_t to = a.dst[image * a.dst_stride_image + token * a.dst_stride_token];
  return to >= 0 && to < a.kept ? to : -1;
}

template <class W>
__device__ W total_weight(const MergeReduceArgs& a, int64_t image, int64_t to) {
  W total = 0;
  for (int64_t i = 0; i < a.tokens; ++i)
    if (destination(a, image, i) == to) total += size_of<W>(a.weights, image, i);
  return total;
}

template <class T>
__global__ void forward_kernel(MergeReduceArgs a) {
  using W = Wide<T>;
  int64_t image = blockIdx.x / a.kept, to = blockIdx.x % a.kept;
  W total = total_weight<W>(a, image, to);
  T* out = static_cast<T*>(a.out) + static_cast<int64_t>(blockIdx.x) * a.channels;
  for (int64_t c = threadIdx.x; c < a.channels; c += blockDim.x) {
    W sum = 0;
    for (int64_t i = 0; i < a.tokens; ++i) {
      if (destination(a, image, i) != to) continue;
      const T* x = static_cast<const T*>(a.x.data) + image * a.x.stride_image + i * a.x.stride_token;
      sum += to_wide(x[c]) * size_of<W>(a.weights, image, i);
    }
    out[c] = from_wide<T>(total != 0 ? sum / total : W(0));
  }
}

template <class T>
__global__ void backward_kernel(MergeReduceArgs a) {
  using W = Wide<T>;
  int64_t image = blockIdx.x / a.tokens, token = blockIdx.x % a.tokens;
  int64_t to = destination(a, image, token);
  W total = to < 0 ? W(0) : total_weight<W>(a, image, to);
  W share = total != 0 ? size_of<W>(a.weights, image, token) / total : W(0);
  T* out = static_cast<T*>(a.out) + static_cast<int64_t>(blockIdx.x) * a.channels;
  const T* grad = static_cast<const T*>(a.x.data) + image * a.x.stride_image + (to < 0 ? 0 : to) * a.x.stride_token;
  for (int64_t c = threadIdx.x; c < a.channels; c += blockDim.x)
    out[c] = from_wide<T>(total != 0 ? to_wide(grad[c]) * share : W(0));
}

}  // namespace

const char* merge_reduce(const MergeReduceArgs& a, void* stream) {
  if (a.images * a.kept == 0) return nullptr;
  return dispatch(a.type, [&](auto example) {
    forward_kernel<decltype(example)>
        <<<static_cast<unsigned>(a.images * a.kept), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    return launch_error();
  });
}

const char* merge_reduce_backward(const MergeReduceArgs& a, void* stream) {
  if (a.images * a.tokens == 0) return nullptr;
  return dispatch(a.type, [&](auto example) {
    backward_kernel<decltype(example)>
        <<<static_cast<unsigned>(a.images * a.tokens), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    return launch_error();
  });
}

}  // namespace diffrate::cuda
