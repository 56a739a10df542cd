// Sort, then gather: one block per token.
#include "cuda/common.cuh"

namespace diffrate::cuda {
namespace {

template <class T>
__global__ void gather_kernel(SortArgs a) {
  using W = Wide<T>;
  int64_t row = blockIdx.x, image = row / a.tokens;
  int64_t token = a.order[row];
  const T* x = static_cast<const T*>(a.x.data) + image * a.x.stride_image + token * a.x.stride_token;
  T* out = static_cast<T*>(a.out) + row * a.channels;
  for (int64_t c = threadIdx.x; c < a.channels; c += blockDim.x) out[c] = x[c];
  if (threadIdx.x == 0) static_cast<W*>(a.out_size)[row] = size_of<W>(a.size, image, token);
}

}  // namespace

const char* sort_tokens(const SortArgs& a, void* stream_pointer) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (a.images * a.tokens == 0) return nullptr;
  if (const char* error = sort_images(a.importance, a.type == Type::f64, a.images, a.tokens, a.prefix, a.order, stream))
    return error;
  return dispatch(a.type, [&](auto example) {
    gather_kernel<decltype(example)><<<static_cast<unsigned>(a.images * a.tokens), kThreads, 0, stream>>>(a);
    return launch_error();
  });
}

}  // namespace diffrate::cuda
