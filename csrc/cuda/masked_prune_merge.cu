// Sort, prune and merge in the search step: all tokens stay, in sorted order, and a mask says which are alive. The kept
// numbers are read here, on the device, so that no search step waits for the host.
#include "cuda/kept_positions.cuh"
#include "cuda/prune_merge_launch.cuh"

namespace diffrate::cuda {
namespace {

template <class T, Reading kReading>
__global__ void __launch_bounds__(kPruneMergeThreads, kBlocksAtOnce<T, kReading>)
    masked_prune_merge_kernel(MaskedPruneMergeArgs a, PruneMergeArgs alive, Layout<Wide<T>> layout) {
  using W = Wide<T>;
  KeptPositions at = read_positions<W>(a);
  ImageBlock<T, kReading> block(alive, layout, at.middle, at.kept, a.tokens);
  sort_image(block);
  int64_t first = block.image * a.tokens;
  W *mask = static_cast<W*>(a.out_mask) + first, *size = static_cast<W*>(a.out_size) + first;
  auto at_least_one = [](W value) { return value < 1 ? W(1) : value; };
  auto is_source = [&](int64_t j) { return j >= at.kept && j < at.middle; };
  for (int64_t j = block.first_thread(); j < a.tokens; j += block.all_threads()) {
    int64_t from = block.token.order[j];
    a.order[first + j] = from;
    mask[j] = j >= at.kept && j < at.last ? W(0) : number_of<W>(a.mask, block.image, from);
    if (is_source(j)) continue;
    a.dst[first + j] = j;
    size[j] = block.sources > 0 && j < at.middle ? at_least_one(block.size_at(j)) : block.size_at(j);
  }
  block.copy_tokens(at.kept, a.tokens);
  if (block.sources == 0) return block.copy_tokens(0, at.kept);
  match_sources(block);
  for (int64_t i = block.first_thread(); i < block.sources; i += block.all_threads()) {
    a.dst[first + block.k_m + i] = block.token.match[i];
    size[block.k_m + i] = at_least_one(block.size_of_source(i));
  }
  merge_sources(block, size, at_least_one);
}

}  // namespace

const char* masked_prune_merge(const MaskedPruneMergeArgs& a, const Scratch& scratch, void* on) {
  Stream stream = static_cast<Stream>(on);
  PruneMergeArgs alive = alive_part(a);
  Plan plan{};
  auto possible = [](const Plan& it) { return it.kernel == Plan::Kernel::rows && clusters_possible(it); };
  if (const char* error = choose_plan(a.images, possible, plan)) return error;
  return with_layout(alive, plan, a.tokens, scratch, stream,
                     [&](auto example, auto reading, Blocks blocks, int64_t shared, auto layout) {
                       return launch(masked_prune_merge_kernel<decltype(example), decltype(reading)::value>, blocks,
                                     kPruneMergeThreads, shared, stream, a, alive, layout);
                     });
}

}  // namespace diffrate::cuda
