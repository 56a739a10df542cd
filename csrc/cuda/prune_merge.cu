// Sort, prune and merge: what stays is written without gaps.
#include <stdlib.h>

#include "cuda/prune_merge_channels.cuh"
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
  int64_t* slot = a.slot + block.image * a.tokens;
  W* size = static_cast<W*>(a.out_size) + block.image * a.k_m;
  for (int64_t j = block.first_thread(); j < a.tokens; j += block.all_threads()) {
    if (j < a.k_m || j >= a.k_p) slot[block.token.order[j]] = j < a.k_m ? j : -1;
    if (j < a.k_m) size[j] = block.size_at(j);
  }
  if (block.sources == 0) return block.copy_tokens(0, a.k_m, done);
  match_sources(block, done);
  for (int64_t i = block.first_thread(); i < block.sources; i += block.all_threads())
    slot[block.token.order[a.k_m + i]] = block.token.match[i];
  merge_sources(block, size, [](W counted) { return counted; }, done);
}

}  // namespace

const char* prune_merge(const PruneMergeArgs& a_, const Scratch& scratch, void* on) {
  PruneMergeArgs a = a_;
  if (getenv("DIFFRATE_NORM") && a.norm.out) {  // EXPERIMENT
    a.norm.out = nullptr;
    if (const char* e = prune_merge(a, scratch, on)) return e;
    return dispatch(a.type, [&](auto x) {
      return normalize_rows<decltype(x)>(a_.norm, a.out, a.images * a.k_m, a.channels, static_cast<Stream>(on));
    });
  }
  Stream stream = static_cast<Stream>(on);
  Plan plan{};
  auto possible = [&](const Plan& it) {
    return it.kernel == Plan::Kernel::rows ? clusters_possible(it) : channels_possible(a, it.parts);
  };
  if (const char* error = choose_plan(a.images, possible, plan)) return error;
  if (plan.kernel == Plan::Kernel::channels) return launch_channels(a, plan.parts, stream);
  return with_layout(a, plan, a.k_p - a.k_m, scratch, stream,
                     [&](auto example, auto reading, Blocks blocks, int64_t shared, auto layout) {
                       using T = decltype(example);
                       constexpr Reading kReading = decltype(reading)::value;
                       return launch(a.norm.out == nullptr ? prune_merge_kernel<T, kReading, false>
                                                           : prune_merge_kernel<T, kReading, true>,
                                     blocks, kPruneMergeThreads, shared, stream, a, layout);
                     });
}

}  // namespace diffrate::cuda
