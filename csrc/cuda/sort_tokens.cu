// Sort and gather in one launch: a block finds the places of some neighbouring tokens and takes them there. Rows are
// read in the order in which they lie, so the first are asked for before it is known where they go.
#include "cuda/ranking.cuh"
#include "cuda/row_chunks.cuh"

namespace diffrate::cuda {
namespace {

template <class T>
constexpr int kBlocks = sizeof(T) < 8 ? 4 : 2;  // that a multiprocessor holds

template <class W>
struct SortShared {
  int32_t* places;  // of the block's tokens
  int64_t bytes;

  __device__ __host__ SortShared(unsigned char* memory, int64_t tokens) {
    Shared pieces(memory);
    take_ranked_keys<W>(pieces, tokens);
    places = pieces.take<int32_t>(kRankedTokens);
    bytes = pieces.bytes();
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRankingThreads, kBlocks<T>) sort_tokens_kernel(SortArgs a) {
  using W = Wide<T>;
  const PartOfRows part({static_cast<int>((a.tokens + kRankedTokens - 1) / kRankedTokens), kRankedTokens}, a.tokens);
  int32_t* places = SortShared<W>(shared_memory(), a.tokens).places;
  auto read = [&](int row, int64_t c) {
    return load_chunk(row_of<T>(a.x, part.image, part.first + row), c, a.channels, kAligned);
  };
  auto write = [&](int row, int64_t c, const Chunk<T>& chunk) {
    T* out = static_cast<T*>(a.out) + (part.image * a.tokens + places[row]) * a.channels;
    store_chunk(chunk, out, c, a.channels, kAligned);
  };
  RowChunks<T> rows(part.count, a.channels);
  ChunkBatch<T> batch;
  if (rows.more()) rows.load(batch, read);
  for_ranked_tokens<W>(a.importance, a.tokens, a.prefix, [&](int64_t, int64_t token, int64_t position) {
    if (lane_id() == 0) places[token - part.first] = static_cast<int32_t>(position);
  });
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < part.count) {
    const int64_t token = part.first + threadIdx.x, to = part.image * a.tokens + places[threadIdx.x];
    a.order[to] = token;
    static_cast<W*>(a.out_size)[to] = size_of<W>(a.size, part.image, token);
  }
  while (rows.more()) {
    rows.store(batch, write);
    if (rows.more()) rows.load(batch, read);
  }
}

}  // namespace

const char* sort_tokens(const SortArgs& a, const Scratch&, void* stream) {
  if (a.tokens > INT32_MAX) return "too many tokens";
  return dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    const bool aligned = aligned_rows<T>(a.x.data, a.channels, a.x.stride_image, a.x.stride_token) &&
                         aligned_rows<T>(a.out, a.channels, 0, 0);
    return launch(aligned ? sort_tokens_kernel<T, true> : sort_tokens_kernel<T, false>,
                  ranking_blocks(a.images, a.tokens), kRankingThreads, SortShared<Wide<T>>(nullptr, a.tokens).bytes,
                  static_cast<Stream>(stream), a);
  });
}

}  // namespace diffrate::cuda
