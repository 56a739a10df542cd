// The sort order of every image: one block per image, a bitonic sort in shared memory.
#include "cuda/common.cuh"

namespace diffrate::cuda {
namespace {

constexpr int kSortThreads = 256;
constexpr int64_t kMostPatches = 4096;  // 48 KB of double keys and positions

template <class A, class W>
__device__ W importance_at(const Importance& from, int64_t image, int64_t patch) {
  const A* base = static_cast<const A*>(from.data) + image * from.stride_image + patch * from.stride_token;
  W sum = 0;
  for (int64_t head = 0; head < from.heads; ++head)
    for (int64_t query = 0; query < from.queries; ++query)
      sum += to_wide(base[head * from.stride_head + query * from.stride_query]);
  return sum / static_cast<W>(from.heads * from.queries);
}

template <class A, class W>
__global__ void sort_kernel(Importance from, int64_t tokens, int64_t prefix, int padded, int64_t* order) {
  using Key = decltype(descending_key(W{}));
  extern __shared__ __align__(8) unsigned char memory[];
  Key* keys = reinterpret_cast<Key*>(memory);
  int* patch = reinterpret_cast<int*>(keys + padded);
  int64_t image = blockIdx.x;
  int patches = static_cast<int>(tokens - prefix);
  for (int j = threadIdx.x; j < padded; j += blockDim.x) {
    // padding has the largest key and, having the largest index too, comes after NaN
    keys[j] = j < patches ? descending_key(importance_at<A, W>(from, image, j)) : ~Key{0};
    patch[j] = j;
  }
  __syncthreads();
  for (int width = 2; width <= padded; width *= 2) {
    for (int step = width / 2; step > 0; step /= 2) {
      for (int j = threadIdx.x; j < padded; j += blockDim.x) {
        int other = j ^ step;
        if (other > j) {
          bool after = keys[j] > keys[other] || (keys[j] == keys[other] && patch[j] > patch[other]);
          if (after == ((j & width) == 0)) {
            Key key = keys[j];
            keys[j] = keys[other];
            keys[other] = key;
            int index = patch[j];
            patch[j] = patch[other];
            patch[other] = index;
          }
        }
      }
      __syncthreads();
    }
  }
  for (int j = threadIdx.x; j < tokens; j += blockDim.x)
    order[image * tokens + j] = j < prefix ? j : patch[j - prefix] + prefix;
}

template <class A, class W>
const char* launch(const Importance& from, int64_t images, int64_t tokens, int64_t prefix, int64_t* order,
                   cudaStream_t stream) {
  int padded = 1;
  while (padded < tokens - prefix) padded *= 2;
  size_t bytes = padded * (sizeof(W) + sizeof(int));
  sort_kernel<A, W>
      <<<static_cast<unsigned>(images), kSortThreads, bytes, stream>>>(from, tokens, prefix, padded, order);
  return launch_error();
}

}  // namespace

const char* sort_images(const Importance& from, bool wide_is_double, int64_t images, int64_t tokens, int64_t prefix,
                        int64_t* order, cudaStream_t stream) {
  if (images == 0 || tokens == 0) return nullptr;
  if (tokens - prefix > kMostPatches) return "the CUDA kernels sort at most 4096 patches";
  return dispatch(from.type, [&](auto example) {
    using A = decltype(example);
    return wide_is_double ? launch<A, double>(from, images, tokens, prefix, order, stream)
                          : launch<A, float>(from, images, tokens, prefix, order, stream);
  });
}

}  // namespace diffrate::cuda
