// Sort, prune and merge in the search step: all tokens stay, in sorted order, and a mask says which are alive. The kept
// numbers are read here, on the device, so that no search step waits for the host.
#include "cuda/prune_merge.cuh"

namespace diffrate::cuda {
namespace {

// A kept number, the nearest whole number in 0 .. tokens.
template <class W>
__device__ int64_t kept_number(const void* kept, int64_t tokens) {
  W number = *static_cast<const W*>(kept);
  if (!(number > 0)) return 0;
  return number < static_cast<W>(tokens) ? static_cast<int64_t>(number + W(0.5)) : tokens;
}

// Which sorted positions do what. Tokens before `kept` stay, those up to `middle` merge into them, those up to `last`
// are pruned, and the rest was not alive before. Numbers that leave nothing to merge into cannot be refused here, as on
// the CPU: they are raised until nothing is out of bounds.
struct Positions {
  int64_t last, middle, kept;

  template <class W>
  __device__ static Positions read(const MaskedPruneMergeArgs& a) {
    W alive = 0;  // in the first image, as in every other; every warp sums for itself
    for (int64_t j = lane_id(); j < a.tokens; j += kWarp) alive += number_of<W>(a.mask, 0, j);
    alive = warp_sum(alive);
    int64_t last = kept_number<W>(&alive, a.tokens);
    int64_t middle = kept_number<W>(a.kept_p_on_device, a.tokens), kept = kept_number<W>(a.kept_m_on_device, a.tokens);
    if (middle > last) middle = last;
    if (middle < a.prefix) middle = a.prefix;
    if (kept > middle) kept = middle;
    if (kept < a.prefix + 1) kept = a.prefix + 1 < middle ? a.prefix + 1 : middle;
    return {last, middle, kept};
  }
};

template <class T, Reading kReading>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, kReading>)
    masked_prune_merge_kernel(MaskedPruneMergeArgs a, PruneMergeArgs alive, Layout<Wide<T>> layout) {
  using W = Wide<T>;
  Positions at = Positions::read<W>(a);
  PruneMerge<T, kReading> op(alive, layout, at.middle, at.kept, a.tokens);
  op.sort();
  op.copy_tokens(0, op.sources > 0 ? a.prefix : at.kept);
  op.copy_tokens(at.kept, a.tokens);
  if (op.sources > 0) {
    op.match();
    op.merge();
  }
  int64_t first = op.image * a.tokens;
  W *mask = static_cast<W*>(a.out_mask) + first, *size = static_cast<W*>(a.out_size) + first;
  auto at_least_one = [](W value) { return value < 1 ? W(1) : value; };
  for (int64_t j = op.first_thread(); j < a.tokens; j += op.all_threads()) {
    int64_t from = op.token.order[j];
    bool source = j >= at.kept && j < at.middle;
    a.order[first + j] = from;
    a.dst[first + j] = source ? op.token.match[j - at.kept] : j;
    mask[j] = j >= at.kept && j < at.last ? W(0) : number_of<W>(a.mask, op.image, from);
    W total = op.size_at(j);
    if (op.sources > 0 && j < at.middle) total = at_least_one(source ? op.size_of_source(j - at.kept) : total);
    if (j < at.kept)
      for (int64_t i = 0; i < op.sources; ++i)
        if (op.token.match[i] == j) total += at_least_one(op.size_of_source(i));
    size[j] = total;
  }
}

// The tokens that stay alive are written as if the others were dropped; what is masked follows after them.
PruneMergeArgs alive_part(const MaskedPruneMergeArgs& a) {
  PruneMergeArgs alive{};
  alive.type = a.type;
  alive.images = a.images;
  alive.tokens = a.tokens;
  alive.channels = a.channels;
  alive.prefix = a.prefix;
  alive.x = a.x;
  alive.importance = a.importance;
  alive.size = a.size;
  alive.cosine_sizes = a.cosine_sizes;
  alive.out = a.out;
  return alive;
}

}  // namespace

int64_t masked_prune_merge_scratch_bytes(const MaskedPruneMergeArgs& a) { return scratch_bytes_of(alive_part(a)); }

const char* masked_prune_merge(const MaskedPruneMergeArgs& a, void* scratch, void* stream) {
  PruneMergeArgs alive = alive_part(a);
  return with_layout(alive, a.tokens, scratch, stream,
                     [&](auto example, auto reading, Blocks blocks, int64_t shared, auto layout) {
                       return launch(masked_prune_merge_kernel<decltype(example), decltype(reading)::value>, blocks,
                                     kThreads, shared, static_cast<Stream>(stream), a, alive, layout);
                     });
}

}  // namespace diffrate::cuda
