// The merge step of prune_merge and masked_prune_merge.
#pragma once

#include "cuda/prune_merge_image.cuh"

namespace diffrate::cuda {

template <class T, Reading kReading>
struct MergeStep {
  using W = Wide<T>;
  using Block = ImageBlock<T, kReading>;
  static constexpr int kCount = Chunk<T>::kCount;

  const Block& block;

  // Gives each destination with sources the mean over itself and them, and the size over both: a warp for each, the one
  // at its first source.
  template <class Counted>
  __device__ void run(W* out_size, Counted counted) const {
    const PruneMergeArgs& a = block.a;
    for (int64_t source = block.first_warp(); source < block.sources; source += block.all_warps()) {
      int32_t to = block.token.match[source];
      if (matched_before(source, to)) continue;
      W own = weight(to), total = own, size = counted(block.size_at(to));
      for_matched(source, to, [&](int64_t i) {
        total += weight(block.k_m + i);
        size += counted(block.size_of_source(i));
      });
      if (lane_id() == 0) out_size[to] = size;
      T* row = block.out_row(to);
      block.for_chunks([&](int64_t c) {
        Chunk<T> mean[Block::kAhead];
#pragma unroll
        for (int u = 0; u < Block::kAhead; ++u)
          mean[u] = load_chunk(row, c + u * Block::kWarpStep, a.channels, Block::kAligned);
#pragma unroll
        for (int u = 0; u < Block::kAhead; ++u)
          if (c - lane_id() * kCount + u * Block::kWarpStep < a.channels)  // for all lanes at once
            store_chunk(mean_with(mean[u], c + u * Block::kWarpStep, source, to, own, total), row,
                        c + u * Block::kWarpStep, a.channels, Block::kAligned);
      });
    }
  }

  // The mean over a destination's chunk at channel c and those of its sources, by a whole warp.
  __device__ Chunk<T> mean_with(const Chunk<T>& destination, int64_t c, int64_t first, int32_t to, W own,
                                W total) const {
    bool resident = block.sources <= block.layout.resident;
    W sum[kCount];
    for (int i = 0; i < kCount; ++i) sum[i] = destination[i] * own;
    for_matched(first, to, [&](int64_t i) {
      W share = weight(block.k_m + i);
      Chunk<T> more = !resident                 ? block.input_chunk(block.input_row(block.k_m + i), c)
                      : c < block.layout.stride ? block.source_chunk(static_cast<int>(i), static_cast<int>(c))
                                                : Chunk<T>{};
      for (int j = 0; j < kCount; ++j) sum[j] += more[j] * share;
    });
    for (int i = 0; i < kCount; ++i) sum[i] /= total;
    return Chunk<T>::of(sum);
  }

  __device__ W weight(int64_t position) const {
    W size = block.a.weighted_mean ? block.size_at(position) : W(1);
    return size > W(kTinySize) ? size : W(kTinySize);
  }

  // Whether a source before this one has the same destination; by a whole warp.
  __device__ bool matched_before(int64_t source, int32_t to) const {
    bool found = false;
    for (int64_t i = lane_id(); i < source; i += kWarp) found = found || block.token.match[i] == to;
    return __ballot_sync(kAllLanes, found) != 0;
  }

  // Calls body(source), by a whole warp, for the sources from `first` on that go to `to`, in ascending order.
  template <class Body>
  __device__ void for_matched(int64_t first, int32_t to, Body body) const {
    for (int64_t begin = first; begin < block.sources; begin += kWarp) {
      int64_t i = begin + lane_id();
      unsigned left = __ballot_sync(kAllLanes, i < block.sources && block.token.match[i] == to);
      for (; left != 0; left &= left - 1) body(begin + __ffs(left) - 1);
    }
  }
};

// `out_size` is the image's: the sizes of destinations with sources are written over. Of each token's size counts what
// `counted` makes of it.
template <class T, Reading kReading, class Counted>
__device__ void merge_sources(const ImageBlock<T, kReading>& block, Wide<T>* out_size, Counted counted) {
  MergeStep<T, kReading>{block}.run(out_size, counted);
}

}  // namespace diffrate::cuda
