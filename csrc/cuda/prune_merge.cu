#include "cuda/prune_merge.cuh"

namespace diffrate::cuda {
namespace {

template <class T, Reading kReading>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, kReading>)
    prune_merge_kernel(PruneMergeArgs a, Layout<Wide<T>> layout) {
  using W = Wide<T>;
  PruneMerge<T, kReading> op(a, layout, a.k_p, a.k_m, a.k_m);
  op.sort();
  op.copy_tokens(0, op.sources > 0 ? a.prefix : a.k_m);
  if (op.sources > 0) {
    op.match();
    op.merge();
  }
  int64_t* slot = a.slot + op.image * a.tokens;
  W* size = static_cast<W*>(a.out_size) + op.image * a.k_m;
  for (int64_t j = op.first_thread(); j < a.tokens; j += op.all_threads()) {
    slot[op.token.order[j]] = j < a.k_m ? j : j < a.k_p ? op.token.match[j - a.k_m] : -1;
    if (j >= a.k_m) continue;
    W total = op.size_at(j);
    for (int64_t i = 0; i < op.sources; ++i)
      if (op.token.match[i] == j) total += op.size_of_source(i);
    size[j] = total;
  }
}

}  // namespace

int64_t prune_merge_scratch_bytes(const PruneMergeArgs& a) { return scratch_bytes_of(a); }

const char* prune_merge(const PruneMergeArgs& a, void* scratch, void* stream) {
  return with_layout(a, a.k_p - a.k_m, scratch, stream,
                     [&](auto example, auto reading, Blocks blocks, int64_t shared, auto layout) {
                       return launch(prune_merge_kernel<decltype(example), decltype(reading)::value>, blocks, kThreads,
                                     shared, static_cast<Stream>(stream), a, layout);
                     });
}

}  // namespace diffrate::cuda
