// ToMe's matching in one launch: a block has an image.
//
// - load: the keys' means over heads, which is what takes the time: everything else reads what has been read.
// - compare: a warp has 16 sources and a part of the destinations, four tiles of 8 at a time, on the tensor cores in
//   half precision; cosines stay in registers.
// - choose: each source's best destination, its rank among all sources, and all slots.
//
// Means and what is found out lie in shared memory; of an image too large for that, in device memory, by the same code.
//
// Rows that are equal have equal cosines, bit by bit, wherever they stand: each goes through the same operations in the
// same order. So ties go to the lower position.
#include "common/bipartition.h"
#include "cuda/best_match.cuh"
#include "cuda/pieces.cuh"
#include "cuda/ranking.cuh"
#include "cuda/tiles.cuh"

namespace diffrate::cuda {
namespace {

// A vision transformer of 197 tokens has 28 pieces of comparing and, with heads of 64 channels in half precision, 1,568
// chunks to load: two and four for each warp and thread.
constexpr int kThreads = 448, kWarps = kThreads / kWarp;
// Of 8 destinations, that a warp compares at once: as many as registers allow.
template <class T>
constexpr int kTiles = kTensorCores<T> ? 4 : 2;
constexpr int kParts = 4;       // of the destinations: a vision transformer's 98 are as many groups of kTiles tiles
constexpr int kHeadsAhead = 4;  // that a thread asks for before it waits for the first

// Blocks that a multiprocessor holds: with two of them 56 KB are on their way, and an H200 needs 25.
template <class T>
constexpr int kBlocks = sizeof(T) < 8 ? 2 : 1;

// Of a row of means. The tensor cores' operands are read by lanes of which four share a row, 64 bytes: rows that lie 64
// bytes from a multiple of 128 apart keep eight lanes in different banks. In float and double eight lanes read the same
// 16 bytes of eight rows.
template <class T>
__device__ __host__ int padded_depth(int64_t channels) {
  constexpr int kCount = Chunk<T>::kCount, kAtOnce = kTensorCores<T> ? 4 * kCount : kCount;
  const int head_dim = static_cast<int>(channels);
  return (head_dim + kAtOnce - 1) / kAtOnce * kAtOnce;
}
template <class T>
__device__ __host__ int row_stride(int depth) {
  constexpr int kBanks = 128 / sizeof(T);
  if constexpr (kTensorCores<T>) return depth % kBanks == 0 ? depth + kBanks / 2 : depth;
  return (depth + kBanks - 1) / kBanks * kBanks + Chunk<T>::kCount;
}

// What a block keeps of its image.
template <class T>
struct MatchMemory {
  using W = Wide<T>;

  T* rows;         // (sources, then destinations; stride): means, zero past the last channel
  W* inverse;      // (the same): 1 / norm
  Best<W>* best;   // (kParts, sources)
  KeyOf<W>* keys;  // (sources, padded): of the cosine with the best of all
  int32_t* match;  // (sources): that destination, -1 where the source stays
  int64_t bytes;

  template <class Pieces>
  __device__ __host__ MatchMemory(Pieces pieces, const Bipartition& split, int stride) {
    rows = pieces.template take<T>((split.sources + split.destinations) * stride);
    inverse = pieces.template take<W>(split.sources + split.destinations);
    best = pieces.template take<Best<W>>(kParts * split.sources);
    keys = pieces.template take<KeyOf<W>>(padded_keys(static_cast<int>(split.sources)));
    match = pieces.template take<int32_t>(split.sources);
    bytes = pieces.bytes();
  }
};

template <class T, bool kAligned>
struct MatchBlock {
  using W = Wide<T>;
  static constexpr int kCount = Chunk<T>::kCount;

  const BipartiteMatchArgs& a;
  const Bipartition split;
  const int64_t image;
  const int depth, stride;
  const MatchMemory<T> memory;
  const int sources, destinations;

  // `far`: device memory for the images, or null.
  __device__ MatchBlock(const BipartiteMatchArgs& args, unsigned char* far)
      : a(args),
        split(bipartition(args)),
        image(blockIdx.x),
        depth(padded_depth<T>(args.head_dim)),
        stride(row_stride<T>(depth)),
        memory(far == nullptr ? MatchMemory<T>(Shared(shared_memory()), split, stride)
                              : MatchMemory<T>(Pieces(far + image * far_bytes()), split, stride)),
        sources(static_cast<int>(split.sources)),
        destinations(static_cast<int>(split.destinations)) {}

  __device__ int64_t far_bytes() const { return MatchMemory<T>(Pieces(nullptr), split, stride).bytes; }

  // --- load

  __device__ int64_t token_of_row(int row) const {
    return row < sources ? split.first_source + 2 * int64_t{row} : split.first_destination + 2 * int64_t{row - sources};
  }

  // The mean of a token's chunk over heads, rounded to T.
  __device__ Chunk<T> mean(int64_t token, int64_t c) const {
    const T* first = static_cast<const T*>(a.keys.data) + image * a.keys.stride_image + token * a.keys.stride_token;
    const int heads = static_cast<int>(a.heads);
    W sum[kCount] = {};
#pragma unroll 1
    for (int begin = 0; begin < heads; begin += kHeadsAhead) {
      Chunk<T> chunk[kHeadsAhead];
#pragma unroll
      for (int h = 0; h < kHeadsAhead; ++h)  // past the last head that once more: no branch stands between the loads
        chunk[h] = load_chunk(first + (begin + h < heads ? begin + h : heads - 1) * a.keys.stride_head, c, a.head_dim,
                              kAligned);
#pragma unroll
      for (int h = 0; h < kHeadsAhead; ++h) {
        if (begin + h >= heads) break;
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] += chunk[h][i];
      }
    }
    const W share = 1 / static_cast<W>(heads);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] *= share;
    return Chunk<T>::of(sum);
  }

  __device__ void load() const {
    const int rows = sources + destinations, chunks = static_cast<int>(depth) / kCount;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows * chunks; i += kThreads) {
      const int row = i / chunks, c = i % chunks * kCount;
      write_chunk(mean(token_of_row(row), c), memory.rows + row * stride + c);
    }
    __syncthreads();
    for (int begin = warp_id() * 8; begin < rows; begin += kWarps * 8) {  // whole warps: lanes add up
      const int row = begin + lane_id() / 4;
      const T* from = memory.rows + (row < rows ? row : rows - 1) * stride;
      W squares = 0;
      for (int c = lane_id() % 4 * kCount; c < depth; c += 4 * kCount) {
        const Chunk<T> chunk = read_chunk(from + c);
#pragma unroll
        for (int i = 0; i < kCount; ++i) squares += chunk[i] * chunk[i];
      }
      const W norm = sqrt(row_sum(squares));
      if (row < rows && lane_id() % 4 == 0) memory.inverse[row] = 1 / (norm < W(kNormEpsilon) ? W(kNormEpsilon) : norm);
    }
    __syncthreads();
  }

  // --- compare

  // Past the last row that once more: what comes of it is not used.
  __device__ const T* source(int i) const { return memory.rows + (i < sources ? i : sources - 1) * stride; }
  __device__ const T* destination(int j) const {
    return memory.rows + (sources + (j < destinations ? j : destinations - 1)) * stride;
  }

  // The dot products of 16 sources with kTiles * 8 destinations, as fragments (cuda/tiles.cuh).
  __device__ __forceinline__ void multiply(W (&sums)[kTiles<T>][4], int first_source, int first_destination) const {
    const int group = lane_id() / 4, quarter = lane_id() % 4;
    const T *above = source(first_source + group), *below = source(first_source + group + 8);
    if constexpr (kTensorCores<T>) {
      // channel by channel, whatever the order of channels: a lane's 16 bytes stand for any channels of the operands
      const T* right[kTiles<T>];
#pragma unroll
      for (int n = 0; n < kTiles<T>; ++n) right[n] = destination(first_destination + n * 8 + group);
#pragma unroll 1
      for (int c = quarter * kCount; c < depth; c += 4 * kCount) {
        const Chunk<T> a0 = read_chunk(above + c), a1 = read_chunk(below + c);
        const uint32_t even[4] = {a0.words[0], a1.words[0], a0.words[1], a1.words[1]};
        const uint32_t odd[4] = {a0.words[2], a1.words[2], a0.words[3], a1.words[3]};
#pragma unroll
        for (int n = 0; n < kTiles<T>; ++n) {
          const Chunk<T> b = read_chunk(right[n] + c);
          multiply_accumulate<T>(sums[n], even, b.words[0], b.words[1]);
          multiply_accumulate<T>(sums[n], odd, b.words[2], b.words[3]);
        }
      }
    } else {
#pragma unroll 1
      for (int c = 0; c < depth; c += kCount) {
        const Chunk<T> a0 = read_chunk(above + c), a1 = read_chunk(below + c);
#pragma unroll
        for (int n = 0; n < kTiles<T>; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Chunk<T> b = read_chunk(destination(first_destination + n * 8 + quarter * 2 + h) + c);
#pragma unroll
            for (int i = 0; i < kCount; ++i) sums[n][h] += a0[i] * b[i], sums[n][2 + h] += a1[i] * b[i];
          }
      }
    }
  }

  __device__ void compare() const {
    constexpr int kGroup = kTiles<T> * 8;
    const int tiles = (sources + 15) / 16, groups = (destinations + kGroup - 1) / kGroup;
    for (int item = warp_id(); item < tiles * kParts; item += kWarps) {
      const int first = item / kParts * 16, part = item % kParts;
      Best<W> best[2] = {{W(-INFINITY), -1}, {W(-INFINITY), -1}};  // of sources `first` + row_in_tile(2 h)
      W inverse[2];
      for (int h = 0; h < 2; ++h) {
        const int i = first + row_in_tile(2 * h);
        inverse[h] = memory.inverse[i < sources ? i : sources - 1];
      }
      for (int g = groups * part / kParts; g < groups * (part + 1) / kParts; ++g) {
        W sums[kTiles<T>][4] = {};
        multiply(sums, first, g * kGroup);
#pragma unroll
        for (int n = 0; n < kTiles<T>; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = g * kGroup + n * 8 + column_in_tile(i);
            if (j >= destinations) continue;
            // by both norms before it is compared: a sum that overflows is then NaN, like one with an infinite key
            best[i / 2].take_better({sums[n][i] * memory.inverse[sources + j] * inverse[i / 2], j});
          }
      }
      for (int h = 0; h < 2; ++h) {
        for (int offset = 1; offset < 4; offset *= 2) best[h].take_better_of_lane(offset);
        const int i = first + row_in_tile(2 * h);
        if (lane_id() % 4 == 0 && i < sources) memory.best[part * sources + i] = best[h];
      }
    }
    __syncthreads();
  }

  // --- choose

  __device__ void choose() const {
    const int tid = static_cast<int>(threadIdx.x);
    for (int i = tid; i < padded_keys(sources); i += kThreads) {
      if (i >= sources) {
        memory.keys[i] = kPaddingKey<KeyOf<W>>;
        continue;
      }
      Best<W> best = memory.best[i];
      for (int part = 1; part < kParts; ++part) best.take_better(memory.best[part * sources + i]);
      memory.keys[i] = descending_key(best.cosine);
      memory.match[i] = best.position < 0 ? 0 : best.position;  // what is similar to nothing goes to the first
    }
    __syncthreads();
    constexpr int kLanes = 4;
    for (int begin = 0; begin < sources; begin += kThreads / kLanes) {  // whole warps: lanes share a source
      const int i = begin + tid / kLanes;
      const int rank = rank_of<kLanes>(memory.keys, sources, i < sources ? i : sources - 1);
      if (i < sources && tid % kLanes == 0 && rank >= a.merged) memory.match[i] = -1;
    }
    __syncthreads();
  }

  __device__ void write_slots() const {
    int64_t* slot = a.slot + image * a.tokens;
    for (int64_t i = threadIdx.x; i < a.prefix; i += kThreads) slot[i] = i;
    for (int64_t j = threadIdx.x; j < destinations; j += kThreads)
      slot[split.first_destination + 2 * j] = split.first_is_merged_into + j;
    auto merges = [&](int i) { return a.merged > 0 && i < sources && memory.match[i] >= 0; };
    for (int begin = warp_id() * kWarp; begin < sources; begin += kThreads) {
      int before = 0;  // sources that merge, before the warp's
      for (int other = 0; other < begin; other += kWarp)
        before += __popc(__ballot_sync(kAllLanes, merges(other + lane_id())));
      const int i = begin + lane_id();
      const unsigned merging = __ballot_sync(kAllLanes, merges(i));
      if (i >= sources) continue;
      before += __popc(merging & ((1u << lane_id()) - 1));
      slot[split.first_source + 2 * int64_t{i}] =
          merges(i) ? split.first_is_merged_into + memory.match[i] : split.first_stays + i - before;
    }
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    bipartite_match_kernel(BipartiteMatchArgs a, unsigned char* far) {
  const MatchBlock<T, kAligned> block(a, far);
  if (a.merged > 0) {
    block.load();
    block.compare();
    block.choose();
  }
  block.write_slots();
}

}  // namespace

const char* bipartite_match(const BipartiteMatchArgs& a, const Scratch& scratch, void* stream) {
  return dispatch(a.type, [&](auto example) -> const char* {
    using T = decltype(example);
    if (a.head_dim > INT32_MAX / 2 || a.tokens * row_stride<T>(padded_depth<T>(a.head_dim)) > INT32_MAX)
      return "the keys of an image are too many";  // for positions in 32 bits
    const bool aligned = aligned_rows<T>(a.keys.data, a.head_dim, a.keys.stride_image, a.keys.stride_token) &&
                         a.keys.stride_head % Chunk<T>::kCount == 0;
    const Bipartition split = bipartition(a);
    const int stride = row_stride<T>(padded_depth<T>(a.head_dim));
    int64_t shared = MatchMemory<T>(Shared(nullptr), split, stride).bytes;
    unsigned char* far = nullptr;
    if (shared > shared_limit()) {
      shared = 0;
      far = static_cast<unsigned char*>(scratch.take(a.images * MatchMemory<T>(Pieces(nullptr), split, stride).bytes));
    }
    return launch(aligned ? bipartite_match_kernel<T, true> : bipartite_match_kernel<T, false>, a.images, kThreads,
                  shared, static_cast<Stream>(stream), a, far);
  });
}

}  // namespace diffrate::cuda
