// The gradients of masked_prune_merge in one launch. Its first blocks are for the mask and the probabilities: they wait
// more than they move, and are done while the others, one warp per row, move features.
#include "cuda/kept_positions.cuh"

namespace diffrate::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPositions = 8;  // in a block, of the mask: 32 bytes of a float mask, what memory gives at a time

// Of the mask, and of the probabilities, which every image's mask was multiplied by. Threads share out the images of
// `kPositions` positions; their sums are added up in a fixed order.
template <class W>
__device__ void mask_gradients(const MaskedPruneMergeBackwardArgs& a) {
  double* partial = Shared(shared_memory()).take<double>(kWarps * kPositions);
  KeptPositions at = a.images > 0 ? read_positions<W>(a) : KeptPositions{};
  int64_t j = static_cast<int64_t>(blockIdx.x) * kPositions + threadIdx.x % kPositions;
  double sum = 0;
  if (j < a.tokens)
#pragma unroll 1  // unrolled it needs half as many registers again, and fewer blocks of features fit
    for (int64_t image = threadIdx.x / kPositions; image < a.images; image += kThreads / kPositions) {
      int64_t from = token_at(a.order, a, image, j);
      W gradient = number_of<W>(a.grad_out_mask, image, j);
      sum += static_cast<double>(gradient) * static_cast<double>(number_of<W>(a.mask, image, from));
      static_cast<W*>(a.grad_mask)[image * a.tokens + from] = merges(at, j) || prunes(at, j) ? W(0) : gradient;
    }
  for (int offset = kPositions; offset < kWarp; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (lane_id() < kPositions) partial[warp_id() * kPositions + lane_id()] = sum;
  __syncthreads();
  if (threadIdx.x >= kPositions || j >= a.tokens) return;
  double all = 0;
  for (int warp = 0; warp < kWarps; ++warp) all += partial[warp * kPositions + threadIdx.x];
  W total = static_cast<W>(all);
  static_cast<W*>(a.grad_prune_prob)[j] = at.middle < at.last && !merges(at, j) ? total : W(0);
  static_cast<W*>(a.grad_merge_prob)[j] = at.kept < at.middle && !prunes(at, j) ? total : W(0);
}

// A destination's gradient is shared by all that merged into it; a source stays in its place besides.
template <class T>
__device__ void feature_gradients(const MaskedPruneMergeBackwardArgs& a, int64_t image, int64_t j, bool aligned) {
  using W = Wide<T>;
  constexpr int kCount = Chunk<T>::kCount;
  constexpr int kStep = kWarp * kCount;
  // every row needs what arrived at its own position, so that is asked for before anything is waited for
  const T* own = row_of<T>(a.grad_out, image, j);
  int64_t c = lane_id() * kCount;
  Chunk<T> chunk = load_chunk(own, c, a.channels, aligned), next = load_chunk(own, c + kStep, a.channels, aligned);
  int64_t from = token_at(a.order, a, image, j), to = token_at(a.dst, a, image, j);
  int members = 0;
  for (int64_t i = lane_id(); i < a.tokens; i += kWarp) members += token_at(a.dst, a, image, i) == to;
  W share = W(1) / static_cast<W>(warp_sum(members));
  const T* mean = row_of<T>(a.grad_out, image, to);
  T* out = static_cast<T*>(a.grad_x) + (image * a.tokens + from) * a.channels;
  for (; c < a.channels; c += kStep) {
    W gradient[kCount];
    if (to == j) {
      for (int i = 0; i < kCount; ++i) gradient[i] = chunk[i] * share;
    } else {
      Chunk<T> whole = load_chunk(mean, c, a.channels, aligned);
      for (int i = 0; i < kCount; ++i) gradient[i] = chunk[i] + whole[i] * share;
    }
    store_chunk(Chunk<T>::of(gradient), out, c, a.channels, aligned);
    chunk = next;
    next = load_chunk(own, c + 2 * kStep, a.channels, aligned);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_prune_merge_backward_kernel(MaskedPruneMergeBackwardArgs a, unsigned mask_blocks, unsigned image_blocks,
                                       bool aligned) {
  if (blockIdx.x < mask_blocks) return mask_gradients<Wide<T>>(a);
  unsigned block = blockIdx.x - mask_blocks;
  int64_t j = static_cast<int64_t>(block % image_blocks) * kWarps + warp_id();
  if (j < a.tokens) feature_gradients<T>(a, block / image_blocks, j, aligned);
}

}  // namespace

const char* masked_prune_merge_backward(const MaskedPruneMergeBackwardArgs& a, const Scratch&, void* stream) {
  int64_t mask_blocks = a.grad_prune_prob ? (a.tokens + kPositions - 1) / kPositions : 0;
  int64_t image_blocks = a.grad_x ? (a.tokens + kWarps - 1) / kWarps : 0;
  Shared shared(nullptr);
  shared.take<double>(kWarps * kPositions);
  return dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    bool aligned = aligned_rows<T>(a.grad_out.data, a.channels, a.grad_out.stride_image, a.grad_out.stride_token) &&
                   aligned_rows<T>(a.grad_x, a.channels, 0, 0);
    return launch(masked_prune_merge_backward_kernel<T>, mask_blocks + a.images * image_blocks, kThreads,
                  shared.bytes(), static_cast<Stream>(stream), a, static_cast<unsigned>(mask_blocks),
                  static_cast<unsigned>(image_blocks), aligned);
  });
}

}  // namespace diffrate::cuda
