// Sort, prune and merge: what stays is written without gaps.
#include "cuda/layer_norm.cuh"
#include "cuda/prune_merge_channels.cuh"
#include "cuda/prune_merge_launch.cuh"

namespace diffrate::cuda {
namespace {

template <class T, Reading kReading>
__global__ void __launch_bounds__(kPruneMergeThreads, kBlocksAtOnce<T, kReading>)
    prune_merge_kernel(PruneMergeArgs a, Layout<Wide<T>> layout) {
  using W = Wide<T>;
  ImageBlock<T, kReading> block(a, layout, a.k_p, a.k_m, a.k_m);
  sort_image(block);
  int64_t* slot = a.slot + block.image * a.tokens;
  W* size = static_cast<W*>(a.out_size) + block.image * a.k_m;
  for (int64_t j = block.first_thread(); j < a.tokens; j += block.all_threads()) {
    if (j < a.k_m || j >= a.k_p) slot[block.token.order[j]] = j < a.k_m ? j : -1;
    if (j < a.k_m) size[j] = block.size_at(j);
  }
  if (block.sources == 0) return block.copy_tokens(0, a.k_m);
  match_sources(block);
  for (int64_t i = block.first_thread(); i < block.sources; i += block.all_threads())
    slot[block.token.order[a.k_m + i]] = block.token.match[i];
  merge_sources(block, size, [](W counted) { return counted; });
}

const char* without_norm(const PruneMergeArgs& a, const Scratch& scratch, Stream stream) {
  Plan plan{};
  auto possible = [&](const Plan& it) {
    return it.kernel == Plan::Kernel::rows ? clusters_possible(it) : channels_possible(a, it.parts);
  };
  if (const char* error = choose_plan(a.images, possible, plan)) return error;
  if (plan.kernel == Plan::Kernel::channels) return launch_channels(a, plan.parts, stream);
  return with_layout(a, plan, a.k_p - a.k_m, scratch, stream,
                     [&](auto example, auto reading, Blocks blocks, int64_t shared, auto layout) {
                       return launch(prune_merge_kernel<decltype(example), decltype(reading)::value>, blocks,
                                     kPruneMergeThreads, shared, stream, a, layout);
                     });
}

}  // namespace

const char* prune_merge(const PruneMergeArgs& a, const Scratch& scratch, void* on) {
  Stream stream = static_cast<Stream>(on);
  const char* error = without_norm(a, scratch, stream);
  if (error != nullptr || a.norm.out == nullptr) return error;
  return dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    return normalize_rows<T, false>(a.norm, {static_cast<const T*>(a.out)}, a.images * a.k_m, a.channels, stream);
  });
}

}  // namespace diffrate::cuda
