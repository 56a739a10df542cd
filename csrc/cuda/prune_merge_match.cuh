// The match step of prune_merge and masked_prune_merge: each source finds its most similar destination, and all tokens
// before the sources are copied on the way.
//
// Source and destination are multiplied channel by channel whatever the order of channels, so a lane's 16 bytes can
// stand for any channels of the tensor cores' operands: no operand is ever rearranged. In half precision the tensor
// cores sum over a row's four lanes; in float and double each lane sums over its own channels for every source, and the
// four lanes' sums are added at the end.
//
// Rows that are equal have equal cosines, bit by bit, wherever they stand: each goes through the same operations in the
// same order. So ties go to the lower position.
#pragma once

#include "cuda/prune_merge_image.cuh"

namespace diffrate::cuda {

constexpr int kDestinations = 8;  // of a warp at a time: a lane holds 16 bytes of the row of destination lane / 4

template <class T, Reading kReading>
struct MatchStep {
  using W = Wide<T>;
  using Block = ImageBlock<T, kReading>;
  static constexpr bool kOnTensorCores = sizeof(T) == 2;
  static constexpr int kCount = Chunk<T>::kCount;
  static constexpr int kMost = kMostSources<T>;
  static constexpr int kAhead = kReadAhead<kReading>;
  static constexpr int kSums = kOnTensorCores ? kMost / 16 : kMost / 4;  // of four numbers each, that a lane sums up
  static constexpr int kLoadAhead = Block::kAligned ? Block::kAhead + Block::kAhead / 2 : 1;  // of sources
  using Sums = W[kSums][4];

  const Block& block;

  __device__ void run() const {
    const int resident = block.layout.resident;
    for (int64_t first = 0; first < block.sources; first += resident) {
      int count = static_cast<int>(block.sources - first < resident ? block.sources - first : resident);
      load_sources(first, count);
      compare(count, first == 0);
      __syncthreads();
      choose(first, count);
      __syncthreads();
    }
  }

  // --- sources, into shared memory

  __device__ void load_sources(int64_t first, int count) const {
    T* sources = block.memory.sources;
    int stride = block.layout.stride, chunks = stride / kCount, total = count * chunks;
    for (int begin = static_cast<int>(threadIdx.x); begin < total; begin += kLoadAhead * kPruneMergeThreads) {
      Chunk<T> chunk[kLoadAhead];
      block.read_input(chunk, [&](int u) {
        int i = begin + u * kPruneMergeThreads < total ? begin + u * kPruneMergeThreads : begin;
        return typename Block::Place{block.input_row(block.k_m + first + i / chunks), i % chunks * kCount};
      });
#pragma unroll
      for (int u = 0; u < kLoadAhead; ++u) {
        int i = begin + u * kPruneMergeThreads;
        if (i < total) write_chunk(chunk[u], sources + static_cast<int64_t>(i) * kCount);
      }
    }
    __syncthreads();
    for (int i = warp_id(); i < count; i += kPruneMergeWarps) {
      W squares = 0;
      for (int c = lane_id() * kCount; c < stride; c += kWarp * kCount) {
        Chunk<T> chunk = block.source_chunk(i, c);
#pragma unroll
        for (int k = 0; k < kCount; ++k) squares += chunk[k] * chunk[k];
      }
      squares = warp_sum(squares);
      if (lane_id() == 0) block.memory.inverse[i] = inverse_norm(squares);
    }
  }

  __device__ static W inverse_norm(W squares) {
    W norm = sqrt(squares);
    return 1 / (norm < W(kNormEpsilon) ? W(kNormEpsilon) : norm);
  }

  // --- destinations

  // Each warp compares some groups of kept tokens with all resident sources, and leaves the best it found in
  // memory.best. In the first pass it also writes them. Prefix tokens are compared like others, but nobody's match.
  __device__ void compare(int count, bool first_pass) const {
    const PruneMergeArgs& a = block.a;
    int group = lane_id() / 4, quarter = lane_id() % 4, channels = static_cast<int>(a.channels);
    for (int i = lane_id(); i < count; i += kWarp) best_of_warp(i) = {W(-INFINITY), -1};
    __syncwarp();

    // positions are 32-bit numbers, as in token.order
    const int end = static_cast<int>(block.k_m), on = static_cast<int>(block.all_warps()) * kDestinations;
    for (int start = static_cast<int>(block.first_warp()) * kDestinations; start < end; start += on) {
      int position = start + group;
      bool inside = position < end, destination = inside && position >= a.prefix;
      if (!inside) position = start;
      typename Block::Row from = block.input_row(position);
      T* to = block.out_row(position);
      W squares = 0;
      Sums sums = {};
      for (int c0 = quarter * kCount; c0 < channels + quarter * kCount; c0 += kAhead * 4 * kCount) {
        Chunk<T> row[kAhead];
        if (first_pass) {
          block.read_input(row, [&](int u) { return typename Block::Place{from, c0 + u * 4 * kCount}; });
        } else {  // what this lane has written
#pragma unroll
          for (int u = 0; u < kAhead; ++u) row[u] = load_chunk(to, c0 + u * 4 * kCount, a.channels, Block::kAligned);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          int c = c0 + u * 4 * kCount;
          if (c - quarter * kCount >= channels) break;  // for all lanes at once
          if (first_pass && inside) store_chunk(row[u], to, c, a.channels, Block::kAligned);
#pragma unroll
          for (int i = 0; i < kCount; ++i) squares += row[u][i] * row[u][i];
          multiply(row[u], c, count, sums);
        }
      }
      squares += __shfl_xor_sync(kAllLanes, squares, 1);
      squares += __shfl_xor_sync(kAllLanes, squares, 2);
      // what is no destination has no cosine: NaN is never better
      W inverse = destination ? inverse_norm(squares) : not_a_number<W>();
      take_better(sums, inverse, start, count);
    }
  }

  // Adds the products of a lane's 16 bytes with the same channels of the sources.
  __device__ void multiply(const Chunk<T>& row, int c, int count, Sums& sums) const {
    if constexpr (kOnTensorCores) {
      const uint32_t* b = row.words;
      int top = lane_id() / 4, last = count - 1;
#pragma unroll
      for (int tile = 0; tile < kSums; ++tile) {
        if (tile * 16 >= count) break;
        // rows past the last source are the last one: what comes of them is not used
        int upper = tile * 16 + top, lower = upper + 8;
        Chunk<T> above = block.source_chunk(upper < last ? upper : last, c);
        Chunk<T> below = block.source_chunk(lower < last ? lower : last, c);
        const uint32_t even[4] = {above.words[0], below.words[0], above.words[1], below.words[1]};
        const uint32_t odd[4] = {above.words[2], below.words[2], above.words[3], below.words[3]};
        multiply_accumulate<T>(sums[tile], even, b[0], b[1]);
        multiply_accumulate<T>(sums[tile], odd, b[2], b[3]);
      }
    } else {
#pragma unroll
      for (int s = 0; s < kSums * 4; ++s) {
        if (s % 8 == 0 && s >= count) break;
        Chunk<T> source = block.source_chunk(s < count ? s : count - 1, c);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[s / 4][s % 4] += row[i] * source[i];
      }
    }
  }

  // Takes the group's destinations where they are better than what the warp has. What a warp has found lies in shared
  // memory: in registers it would take the room of what is being read.
  __device__ void take_better(Sums& sums, W inverse, int32_t start, int count) const {
    int group = lane_id() / 4, quarter = lane_id() % 4;
    if constexpr (kOnTensorCores) {
      // a lane has the sums of sources lane / 4 and lane / 4 + 8 with destinations 2 quarter and the next
      W left = __shfl_sync(kAllLanes, inverse, quarter * 8), right = __shfl_sync(kAllLanes, inverse, quarter * 8 + 4);
      int32_t here = start + quarter * 2;
#pragma unroll
      for (int tile = 0; tile < kSums; ++tile) {
        if (tile * 16 >= count) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Best<W> best{W(-INFINITY), -1};
          best.take_better({sums[tile][half * 2] * left, here});
          best.take_better({sums[tile][half * 2 + 1] * right, here + 1});
          for (int offset = 1; offset < 4; offset *= 2) best.take_better_of_lane(offset);
          if (quarter == 0) leave(best, tile * 16 + half * 8 + group, count);
        }
      }
    } else {
      int32_t here = start + group;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        if (i * 4 >= count) break;
        W mine = 0;  // lane `quarter` takes source 4 i + quarter
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          W sum = sums[i][j];
          sum += __shfl_xor_sync(kAllLanes, sum, 1);
          sum += __shfl_xor_sync(kAllLanes, sum, 2);
          if (j == quarter) mine = sum;
        }
        Best<W> best{W(-INFINITY), -1};
        best.take_better({mine * inverse, here});
        for (int offset = 4; offset < kWarp; offset *= 2) best.take_better_of_lane(offset);
        if (group == 0) leave(best, i * 4 + quarter, count);
      }
    }
  }

  __device__ Best<W>& best_of_warp(int source) const { return block.memory.best[warp_id() * kMost + source]; }
  // Always by the same lane for a source.
  __device__ void leave(Best<W> best, int source, int count) const {
    if (source < count) best_of_warp(source).take_better(best);
  }

  // --- the choice, among what warps and parts found

  __device__ void choose(int64_t first, int count) const {
    const int parts = block.layout.parts;
    const int64_t tokens = block.a.tokens;
    Best<W>* exchange = parts == 1 ? nullptr : block.layout.exchange + block.image * parts * tokens + first;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kPruneMergeThreads) {
      Best<W> best = block.memory.best[i];
      for (int warp = 1; warp < kPruneMergeWarps; ++warp) best.take_better(block.memory.best[warp * kMost + i]);
      if (exchange == nullptr)
        store_match(first, i, best);
      else
        exchange[block.part * tokens + i] = best;
    }
    if (exchange == nullptr) return;
    cluster_barrier();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kPruneMergeThreads) {
      Best<W> best = exchange[i];
      for (int other = 1; other < parts; ++other) best.take_better(exchange[other * tokens + i]);
      store_match(first, i, best);
    }
  }

  __device__ void store_match(int64_t first, int i, Best<W> best) const {
    // a source that is similar to nothing (NaN features) goes to the first destination
    bool none = best.position < 0;
    block.token.match[first + i] = none ? static_cast<int32_t>(block.a.prefix) : best.position;
    block.token.cosine[first + i] = none ? not_a_number<W>() : best.cosine * block.memory.inverse[i];
  }
};

template <class T, Reading kReading>
__device__ void match_sources(const ImageBlock<T, kReading>& block) {
  MatchStep<T, kReading>{block}.run();
}

}  // namespace diffrate::cuda
