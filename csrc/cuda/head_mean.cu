#include "cuda/head_mean.cuh"

namespace diffrate::cuda {
namespace {

constexpr int kThreads = 128;

// How many queries of the image count, the same in all threads.
template <class W>
__device__ W queries_of(const HeadMeanArgs& a, int64_t image) {
  if (!a.received) return 1;
  if (a.mask.data == nullptr) return static_cast<W>(a.tokens);
  W sum = 0;  // every warp adds up everything: it is little, and no barrier is needed
  for (int64_t j = lane_id(); j < a.tokens; j += kWarp) sum += number_of<W>(a.mask, image, j);
  sum = warp_sum(sum);
  return sum < W(kTinySize) ? W(kTinySize) : sum;
}

template <class W>
__global__ void __launch_bounds__(kThreads) head_mean_kernel(HeadMeanArgs a, int64_t blocks_of_image) {
  int64_t image = blockIdx.x / blocks_of_image;
  int64_t token = a.prefix + blockIdx.x % blocks_of_image * kThreads + threadIdx.x;
  W queries = queries_of<W>(a, image);
  if (token >= a.tokens) return;
  const W* rows = static_cast<const W*>(a.rows) + image * a.heads * a.tokens + token;
  W sum = 0;
  for (int64_t head = 0; head < a.heads; ++head) sum += rows[head * a.tokens];
  static_cast<W*>(a.importance)[image * (a.tokens - a.prefix) + token - a.prefix] =
      sum / (static_cast<W>(a.heads) * queries);
}

}  // namespace

const char* head_mean(const HeadMeanArgs& a, Stream stream) {
  int64_t blocks_of_image = (a.tokens - a.prefix + kThreads - 1) / kThreads;
  return launch(a.type == Type::f64 ? head_mean_kernel<double> : head_mean_kernel<float>, a.images * blocks_of_image,
                kThreads, 0, stream, a, blocks_of_image);
}

}  // namespace diffrate::cuda
