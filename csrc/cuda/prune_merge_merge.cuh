// The merge step of prune_merge and masked_prune_merge.
#pragma once

#include "cuda/prune_merge_image.cuh"

namespace diffrate::cuda {

template <class T, Reading kReading, class Done>
struct MergeStep {
  using W = Wide<T>;
  using Block = ImageBlock<T, kReading>;
  static constexpr int kCount = Chunk<T>::kCount;

  const Block& block;
  Done done;

  // Gives each destination the mean over itself and its sources: a warp for each, the one at its first source.
  __device__ void run() const {
    const PruneMergeArgs& a = block.a;
    const int64_t k_m = block.k_m;
    bool resident = block.sources <= block.layout.resident;
    for (int64_t source = block.first_warp(); source < block.sources; source += block.all_warps()) {
      int32_t to = block.token.match[source];
      if (matched_before(source, to)) continue;
      W own = weight(to), total = own;
      for_matched(source, to, [&](int64_t i) { total += weight(k_m + i); });
      for (int64_t first = 0; first < a.channels; first += kWarp * kCount) {
        int64_t c = first + lane_id() * kCount;
        Chunk<T> mean = load_chunk(block.out_row(to), c, a.channels, Block::kAligned);
        W sum[kCount];
        for (int i = 0; i < kCount; ++i) sum[i] = mean[i] * own;
        for_matched(source, to, [&](int64_t i) {
          W share = weight(k_m + i);
          Chunk<T> more = !resident                 ? block.input_chunk(block.input_row(k_m + i), c)
                          : c < block.layout.stride ? block.source_chunk(static_cast<int>(i), static_cast<int>(c))
                                                    : Chunk<T>{};
          for (int j = 0; j < kCount; ++j) sum[j] += more[j] * share;
        });
        for (int i = 0; i < kCount; ++i) sum[i] /= total;
        store_chunk(Chunk<T>::of(sum), block.out_row(to), c, a.channels, Block::kAligned);
      }
      done(to, to + 1);
    }
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

template <class T, Reading kReading, class Done = Nothing>
__device__ void merge_sources(const ImageBlock<T, kReading>& block, Done done = {}) {
  MergeStep<T, kReading, Done>{block, done}.run();
}

}  // namespace diffrate::cuda
