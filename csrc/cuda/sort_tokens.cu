// Sort and gather in one launch: a warp finds the places of its tokens and takes them there.
#include "cuda/ranking.cuh"

namespace diffrate::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kRankingThreads) sort_tokens_kernel(SortArgs a, bool aligned) {
  using W = Wide<T>;
  for_ranked_tokens<W>(a.importance, a.tokens, a.prefix, [&](int64_t image, int64_t token, int64_t position) {
    const T* x = row_of<T>(a.x, image, token);
    int64_t to = image * a.tokens + position;
    T* out = static_cast<T*>(a.out) + to * a.channels;
    for (int64_t c = lane_id() * Chunk<T>::kCount; c < a.channels; c += kWarp * Chunk<T>::kCount)
      store_chunk(load_chunk(x, c, a.channels, aligned), out, c, a.channels, aligned);
    if (lane_id() != 0) return;
    a.order[to] = token;
    static_cast<W*>(a.out_size)[to] = size_of<W>(a.size, image, token);
  });
}

}  // namespace

const char* sort_tokens(const SortArgs& a, const Scratch&, void* stream) {
  return dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    bool aligned = aligned_rows<T>(a.x.data, a.channels, a.x.stride_image, a.x.stride_token) &&
                   aligned_rows<T>(a.out, a.channels, 0, 0);
    return launch(sort_tokens_kernel<T>, ranking_blocks(a.images, a.tokens), kRankingThreads,
                  ranking_shared_bytes<Wide<T>>(a.tokens), static_cast<Stream>(stream), a, aligned);
  });
}

}  // namespace diffrate::cuda
