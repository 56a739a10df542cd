// Sort, prune and merge in one launch: what prune_merge and masked_prune_merge share.
//
// An image has one thread block, or a cluster of them (`parts`) where images are few. Each block takes three steps:
//
// - prune_merge_sort.cuh: each block sorts for itself. Images of very many tokens are sorted by a launch before.
// - prune_merge_match.cuh: the sources of the image (k_p - k_m tokens: few; if not, so many at a time) are kept in
//   shared memory. The tokens that are kept are shared out and stream by, eight to a warp: a row is read once, copied
//   to the output and compared with all sources while it is in registers.
// - prune_merge_merge.cuh: only the destinations that received a source are read again, from the output.
//
// Nothing depends on the order of blocks or warps. prune_merge_plan.cuh chooses how many blocks, prune_merge_launch.cuh
// lays out a launch. Where images are few another kernel does the same with less waiting: prune_merge_channels.cuh.
//
// This file: a block and its image, shared memory, and how rows are read.
#pragma once

#include "cuda/best_match.cuh"
#include "cuda/ranking.cuh"

namespace diffrate::cuda {

// Ten warps have two of the twenty groups of 8 tokens each that a vision transformer of 197 tokens keeps.
constexpr int kPruneMergeThreads = 320;
constexpr int kPruneMergeWarps = kPruneMergeThreads / kWarp;
constexpr int64_t kNearTokens = 2048;  // with more, what each token needs is kept in device memory

// What is compared at once: as many sources as registers allow.
template <class T>
constexpr int kMostSources = sizeof(T) == 2   ? 64
                             : sizeof(T) == 4 ? 32
                                              : 16;

// How rows are read: 16 bytes at a time by lanes that have so many chunks under way, or number by number where rows are
// not aligned. Of many images two blocks on a multiprocessor hide each other's waiting; of few there is only one, which
// takes all registers to read ahead. Float and double, whose rows are wide, always use many_images.
enum class Reading { many_images, few_images, unaligned };
template <Reading kReading>
constexpr int kReadAhead = kReading == Reading::many_images  ? 4
                           : kReading == Reading::few_images ? 8
                                                             : 1;
template <class T, Reading kReading>
constexpr int kBlocksAtOnce = sizeof(T) == 2 && kReading == Reading::many_images ? 2 : 1;

// What is kept for each token of an image: in shared memory, or in device memory where there are many tokens.
template <class W>
struct PerToken {
  int32_t* order;  // (N): the input position of each sorted position
  int32_t* match;  // (sources): the sorted position of the destination
  W* cosine;       // (sources): with that destination
  W* size;         // (N): by input position; null in device memory, where the argument has them
};

// Shared memory of a block.
template <class T>
struct ImageMemory {
  using W = Wide<T>;
  KeyOf<W>* keys;  // (N - P, padded); these two only for images of at most kNearTokens
  PerToken<W> token;
  W* inverse;     // (resident): 1 / norm of each source
  Best<W>* best;  // (kPruneMergeWarps, kMostSources): what each warp has found, by sorted position and before
                  // division by the source's norm
  T* sources;     // (resident, stride)
  int64_t bytes;

  __host__ __device__ ImageMemory(unsigned char* base, int64_t tokens, int resident, int stride)
      : keys(nullptr), token{} {
    Shared shared(base);
    if (tokens <= kNearTokens) {
      keys = shared.take<KeyOf<W>>(padded_keys(static_cast<int>(tokens)));
      token.order = shared.take<int32_t>(tokens);
      token.match = shared.take<int32_t>(tokens);
      token.cosine = shared.take<W>(tokens);
      token.size = shared.take<W>(tokens);
    }
    inverse = shared.take<W>(kMostSources<T>);
    best = shared.take<Best<W>>(kPruneMergeWarps * kMostSources<T>);
    sources = shared.take<T>(static_cast<int64_t>(resident) * stride);
    bytes = shared.bytes();
  }
};

// How a launch is laid out.
template <class W>
struct Layout {
  int parts;          // blocks that share an image
  int stride;         // of a source in shared memory
  int resident;       // sources that fit there at once
  PerToken<W> far;    // device memory of all images, or null
  Best<W>* exchange;  // (B, parts, N): where the parts of an image show each other what they found, or null
};

// Four neighbouring lanes read 64 bytes of a row, and rows that lie 64 bytes from a multiple of 128 apart keep eight
// lanes in different banks.
template <class T>
int source_stride(int64_t channels) {
  int64_t bytes = (channels * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return static_cast<int>((bytes % 128 == 0 ? bytes + 64 : bytes) / static_cast<int64_t>(sizeof(T)));
}

// Whether all rows can be read 16 bytes at a time.
template <class T>
bool all_aligned(const PruneMergeArgs& a) {
  auto aligned = [&](const Tokens& x) { return aligned_rows<T>(x.data, a.channels, x.stride_image, x.stride_token); };
  return aligned(a.x) && (a.residual.data == nullptr || aligned(a.residual)) && aligned({a.out, 0, 0});
}

// One block and its image.
template <class T, Reading kReading>
struct ImageBlock {
  using W = Wide<T>;
  static constexpr int kCount = Chunk<T>::kCount;
  static constexpr int kAhead = kReadAhead<kReading>;
  static constexpr bool kAligned = kReading != Reading::unaligned;

  const PruneMergeArgs& a;
  int64_t k_m;         // the image's, whatever the arguments say
  int64_t out_tokens;  // rows of an image in `out`
  const Layout<W>& layout;
  int64_t image;
  int part;
  ImageMemory<T> memory;
  PerToken<W> token;
  int64_t sources;

  __device__ ImageBlock(const PruneMergeArgs& args, const Layout<W>& how, int64_t pruned, int64_t merged, int64_t rows)
      : a(args),
        k_m(merged),
        out_tokens(rows),
        layout(how),
        image(blockIdx.x / how.parts),
        part(static_cast<int>(blockIdx.x) % how.parts),
        memory(shared_memory(), args.tokens, how.resident, how.stride),
        token(memory.token),
        sources(pruned - merged) {
    if (how.far.order != nullptr)
      token = {how.far.order + image * a.tokens, how.far.match + image * a.tokens, how.far.cosine + image * a.tokens,
               nullptr};
  }

  // The warps of all parts share out rows, the threads of all parts positions.
  __device__ int64_t first_warp() const { return part * kPruneMergeWarps + warp_id(); }
  __device__ int64_t all_warps() const { return static_cast<int64_t>(layout.parts) * kPruneMergeWarps; }
  __device__ int64_t first_thread() const { return static_cast<int64_t>(part) * kPruneMergeThreads + threadIdx.x; }
  __device__ int64_t all_threads() const { return static_cast<int64_t>(layout.parts) * kPruneMergeThreads; }

  // --- rows

  __device__ T* out_row(int64_t position) const {
    return static_cast<T*>(a.out) + (image * out_tokens + position) * a.channels;
  }

  // A row of the input, and of the residual or null.
  struct Row {
    const T *x, *residual;
  };
  __device__ Row input_row(int64_t position) const {
    int64_t from = token.order[position];
    return {row_of<T>(a.x, image, from), a.residual.data == nullptr ? nullptr : row_of<T>(a.residual, image, from)};
  }

  // Chunks of rows, with the residual added as eager PyTorch would (rounded to T). All are asked for before the first
  // is used. `where(u)` gives the row and the channel of chunk u.
  struct Place {
    Row row;
    int64_t c;
  };
  template <int kChunks, class Where>
  __device__ void read_input(Chunk<T> (&chunk)[kChunks], Where where) const {
    Chunk<T> more[kChunks];
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      auto [row, c] = where(u);
      chunk[u] = load_chunk(row.x, c, a.channels, kAligned);
    }
    if (a.residual.data == nullptr) return;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      auto [row, c] = where(u);
      more[u] = load_chunk(row.residual, c, a.channels, kAligned);
    }
#pragma unroll
    for (int u = 0; u < kChunks; ++u) chunk[u] = sum_of(chunk[u], more[u]);
  }
  __device__ Chunk<T> input_chunk(const Row& row, int64_t c) const {
    Chunk<T> chunk[1];
    read_input(chunk, [&](int) { return Place{row, c}; });
    return chunk[0];
  }

  // A warp shares out a row: calls body(c) so that this lane has the kAhead chunks at c, c + kWarpStep ..., some of
  // them perhaps past the end.
  static constexpr int kWarpStep = kWarp * kCount;
  template <class Body>
  __device__ void for_chunks(Body body) const {
    for (int64_t first = 0; first < a.channels; first += kAhead * kWarpStep) body(first + lane_id() * kCount);
  }

  // The chunk at channel c of a source in shared memory, of those that are there.
  __device__ Chunk<T> source_chunk(int source, int c) const {
    return read_chunk(memory.sources + static_cast<int64_t>(source) * layout.stride + c);
  }

  // Copies the tokens at the positions begin .. end-1.
  __device__ void copy_tokens(int64_t begin, int64_t end) const {
    for (int64_t position = begin + first_warp(); position < end; position += all_warps()) copy_token(position);
  }
  __device__ void copy_token(int64_t position) const {
    Row row = input_row(position);
    for_chunks([&](int64_t c) {
      Chunk<T> chunk[kAhead];
      read_input(chunk, [&](int u) { return Place{row, c + u * kWarpStep}; });
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        store_chunk(chunk[u], out_row(position), c + u * kWarpStep, a.channels, kAligned);
    });
  }

  // --- sizes

  __device__ W size_at(int64_t position) const {
    int32_t from = token.order[position];
    return token.size != nullptr ? token.size[from] : size_of<W>(a.size, image, from);
  }

  // What a source counts for when sizes add up.
  __device__ W size_of_source(int64_t source) const {
    W size = size_at(k_m + source);
    return a.cosine_sizes ? size * token.cosine[source] : size;
  }
};

}  // namespace diffrate::cuda
