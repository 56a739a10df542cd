// Sort, prune and merge: what stays is written without gaps.
#include "cuda/prune_merge_launch.cuh"
#include "cuda/prune_merge_norm.cuh"

namespace diffrate::cuda {
namespace {

template <class T, Reading kReading, bool kNorm>
__global__ void __launch_bounds__(kPruneMergeThreads, kBlocksAtOnce<T, kReading>)
    prune_merge_kernel(PruneMergeArgs a, Layout<Wide<T>> layout) {
  using W = Wide<T>;
  ImageBlock<T, kReading> block(a, layout, a.k_p, a.k_m, a.k_m);
  auto done = [&](int64_t first, int64_t end) {
    if constexpr (kNorm) {  // at once, while the rows are near: those that something is merged into once more
      __syncwarp();
      int64_t start = block.image * a.k_m;
      NormStep<T, ImageBlock<T, kReading>::kAligned>{a.norm, a.channels}.run(static_cast<const T*>(a.out),
                                                                             start + first, start + end, 1);
    }
  };
  sort_image(block);
  block.copy_tokens(0, block.sources > 0 ? a.prefix : a.k_m, done);
  if (block.sources > 0) {
    match_sources(block, done);
    merge_sources(block, done);
  }
  int64_t* slot = a.slot + block.image * a.tokens;
  W* size = static_cast<W*>(a.out_size) + block.image * a.k_m;
  for (int64_t j = block.first_thread(); j < a.tokens; j += block.all_threads()) {
    slot[block.token.order[j]] = j < a.k_m ? j : j < a.k_p ? block.token.match[j - a.k_m] : -1;
    if (j >= a.k_m) continue;
    W total = block.size_at(j);
    for (int64_t i = 0; i < block.sources; ++i)
      if (block.token.match[i] == j) total += block.size_of_source(i);
    size[j] = total;
  }
}

}  // namespace

const char* prune_merge(const PruneMergeArgs& a, const Scratch& scratch, void* on) {
  Stream stream = static_cast<Stream>(on);
  return with_layout(
      a, a.k_p - a.k_m, scratch, stream, [&](auto example, auto reading, Blocks blocks, int64_t shared, auto layout) {
        using T = decltype(example);
        constexpr Reading kReading = decltype(reading)::value;
        return launch(
            a.norm.out == nullptr ? prune_merge_kernel<T, kReading, false> : prune_merge_kernel<T, kReading, true>,
            blocks, kPruneMergeThreads, shared, stream, a, layout);
      });
}

}  // namespace diffrate::cuda
