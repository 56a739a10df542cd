// How prune_merge and masked_prune_merge are launched: blocks, shared memory and device memory.
#pragma once

#include <type_traits>

#include "cuda/prune_merge_match.cuh"
#include "cuda/prune_merge_merge.cuh"
#include "cuda/prune_merge_plan.cuh"
#include "cuda/prune_merge_sort.cuh"

namespace diffrate::cuda {

// Whether the blocks of a plan can wait for each other. One kernel stands for all, which are compiled for the same
// architectures.
inline bool clusters_possible(const Plan& plan) { return plan.parts == 1 || has_clusters(order_kernel<float>); }

// Device memory: what each token needs where they are many, and what the parts of an image show each other.
inline int64_t scratch_bytes_of(const PruneMergeArgs& a, int64_t parts) {
  int64_t all = a.images * a.tokens;
  int64_t far = a.tokens > kNearTokens ? all * static_cast<int64_t>(sizeof(double) + 2 * sizeof(int32_t)) : 0;
  return far + (parts > 1 ? all * parts * static_cast<int64_t>(sizeof(Best<double>)) : 0);
}

// Where sources number at most `most`. `error` becomes what cannot be done.
template <class T>
Layout<Wide<T>> layout_of(const PruneMergeArgs& a, int parts, int64_t most, const Scratch& scratch,
                          const char*& error) {
  using W = Wide<T>;
  Layout<W> layout{};
  layout.parts = parts;
  layout.stride = source_stride<T>(a.channels);
  int64_t row =
      ImageMemory<T>(nullptr, a.tokens, 1, layout.stride).bytes - ImageMemory<T>(nullptr, a.tokens, 0, 0).bytes;
  int64_t room = shared_limit() - ImageMemory<T>(nullptr, a.tokens, 0, 0).bytes;
  int64_t resident = most < kMostSources<T> ? most : kMostSources<T>;
  if (resident * row > room) resident = room / row;
  if (resident == 0 && most > 0) error = "a token has more channels than the CUDA kernels can keep in shared memory";
  layout.resident = static_cast<int>(resident);
  // the widest first, so that all are aligned
  int64_t all = a.images * a.tokens;
  layout.exchange = static_cast<Best<W>*>(scratch.take(scratch_bytes_of(a, layout.parts)));
  if (a.tokens <= kNearTokens) return layout;
  layout.far.cosine = reinterpret_cast<W*>(layout.exchange + (layout.parts > 1 ? all * layout.parts : 0));
  layout.far.order = reinterpret_cast<int32_t*>(layout.far.cosine + all);
  layout.far.match = layout.far.order + all;
  return layout;
}

// Calls run(T{}, reading, blocks, bytes of shared memory, layout), with the sort order of large images ready. Sources
// number at most `most`.
template <class Run>
const char* with_layout(const PruneMergeArgs& a, const Plan& plan, int64_t most, const Scratch& scratch, Stream stream,
                        Run run) {
  if (a.tokens == 0) return nullptr;
  return dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    using W = Wide<T>;
    const char* error = nullptr;
    Layout<W> layout = layout_of<T>(a, plan.parts, most, scratch, error);
    if (error == nullptr && layout.far.order != nullptr)
      error = launch(order_kernel<W>, ranking_blocks(a.images, a.tokens), kRankingThreads,
                     ranking_shared_bytes<W>(a.tokens), stream, a, layout.far.order);
    if (error != nullptr) return error;
    Blocks blocks(a.images * layout.parts, layout.parts);
    int64_t shared = ImageMemory<T>(nullptr, a.tokens, layout.resident, layout.stride).bytes;
    auto with = [&](auto reading) { return run(example, reading, blocks, shared, layout); };
    if (!all_aligned<T>(a)) return with(std::integral_constant<Reading, Reading::unaligned>{});
    if constexpr (sizeof(T) == 2)  // wide rows have enough under way
      if (plan.reading == Reading::few_images) return with(std::integral_constant<Reading, Reading::few_images>{});
    return with(std::integral_constant<Reading, Reading::many_images>{});
  });
}

}  // namespace diffrate::cuda
