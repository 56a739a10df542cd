// Mean of the tokens that share a destination, and its gradient. A block has some rows that are written: it looks once
// at all destinations of the image, and then every thread copies or adds up chunks of rows.
#include "cuda/merge_reduce_search.cuh"
#include "cuda/ranking.cuh"
#include "cuda/row_chunks.cuh"

namespace diffrate::cuda {
namespace {

constexpr int kThreads = 384;
constexpr int64_t kTokensAtOnce = 2048;   // whose destinations are in shared memory
constexpr int64_t kMostRows = kThreads;   // of a block
constexpr uint32_t kNowhere = INT32_MAX;  // no destination is as large

// Blocks that a multiprocessor holds: of what counts, not of what needs more registers.
template <class T, bool kAligned>
constexpr int kBlocks = kAligned && sizeof(T) < 8 ? 2 : 1;

__device__ uint32_t destination_of(const MergeReduceArgs& a, int64_t image, int64_t token) {
  int64_t to = a.dst[image * a.dst_stride_image + token * a.dst_stride_token];
  return to >= 0 && to < a.kept ? static_cast<uint32_t>(to) : kNowhere;  // elsewhere it goes nowhere, whatever it is
}

// Destinations and weights of tokens of the image, in groups of four.
template <class W>
struct TokensAtOnce {
  static constexpr uint32_t kPadding = kPaddingKey<uint32_t>;

  uint32_t* to;
  W* weights;

  __device__ __host__ TokensAtOnce(Shared& shared, const MergeReduceArgs& a)
      : to(shared.take<uint32_t>(padded_keys(most(a)))), weights(shared.take<W>(padded_keys(most(a)))) {}
  __device__ __host__ static int most(const MergeReduceArgs& a) {
    return static_cast<int>(a.tokens < kTokensAtOnce ? a.tokens : kTokensAtOnce);
  }

  __device__ void fill(const MergeReduceArgs& a, int64_t image, int64_t first, int count) const {
    for (int j = static_cast<int>(threadIdx.x); j < padded_keys(count); j += kThreads) {
      to[j] = j < count ? destination_of(a, image, first + j) : kPadding;
      weights[j] = j < count ? size_of<W>(a.weights, image, first + j) : W(0);
    }
  }
};

// The image's tokens sorted by destination, those of each in ascending order.
template <class W>
struct Members {
  struct Member {
    uint32_t to;
    int token;
  };
  struct Span {
    int begin, end;
  };

  TokensAtOnce<W> tokens;
  Member* sorted;
  Span* spans;  // of the destinations that are the block's rows

  __device__ __host__ Members(Shared& shared, const MergeReduceArgs& a, int64_t rows)
      : tokens(shared, a), sorted(shared.take<Member>(a.tokens)), spans(shared.take<Span>(rows)) {}

  __device__ void find(const MergeReduceArgs& a, const PartOfRows& rows) const {
    const int tid = static_cast<int>(threadIdx.x), count = static_cast<int>(a.tokens);
    const uint32_t first = static_cast<uint32_t>(rows.first), after = first + static_cast<uint32_t>(rows.count);
    tokens.fill(a, rows.image, 0, count);
    for (int j = tid; j < count; j += kThreads) sorted[j] = {kNowhere, 0};
    for (int row = tid; row < rows.count; row += kThreads) spans[row] = {0, 0};
    __syncthreads();
    for (int j = tid; j < count; j += kThreads)
      if (const uint32_t to = tokens.to[j]; to >= first && to < after)
        sorted[rank_of<1>(tokens.to, count, j)] = {to, j};
    __syncthreads();
    for (int j = tid; j < count; j += kThreads) {
      const uint32_t to = sorted[j].to;
      if (to == kNowhere) continue;
      if (j == 0 || sorted[j - 1].to != to) spans[to - first].begin = j;
      if (j == count - 1 || sorted[j + 1].to != to) spans[to - first].end = j + 1;
    }
    __syncthreads();
  }
};

// Whether there is one. Of aligned rows a kernel is compiled for either case, so that no branch stands between loads.
enum class Residual { no, yes, perhaps };

template <class T, bool kAligned, Residual kResidual>
struct MergeReduce {
  using W = Wide<T>;
  using Span = typename Members<W>::Span;
  static constexpr int kCount = Chunk<T>::kCount;

  const MergeReduceArgs& a;
  const PartOfRows& rows;
  const Members<W>& members;

  __device__ Chunk<T> input(int place, int64_t c) const {
    const int token = members.sorted[place].token;
    const Chunk<T> x = load_chunk(row_of<T>(a.x, rows.image, token), c, a.channels, kAligned);
    if (kResidual == Residual::no || (kResidual == Residual::perhaps && a.residual.data == nullptr)) return x;
    return sum_of(x, load_chunk(row_of<T>(a.residual, rows.image, token), c, a.channels, kAligned));
  }

  // The mean of a row, of which the first token's chunk is there.
  __device__ Chunk<T> mean(const Span& span, int64_t c, const Chunk<T>& first) const {
    if (span.end - span.begin == 1) {  // the mean of one token is that token, unless its weight is zero or not finite
      const W weight = members.tokens.weights[members.sorted[span.begin].token];
      if (weight != 0 && weight - weight == 0) return first;
    }
    W sum[kCount] = {}, total = 0;
    for (int place = span.begin; place < span.end; ++place) {
      const W weight = members.tokens.weights[members.sorted[place].token];
      const Chunk<T> x = place == span.begin ? first : input(place, c);
      total += weight;
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += x[i] * weight;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = total != 0 ? sum[i] / total : W(0);
    return Chunk<T>::of(sum);
  }

  __device__ void run() const {
    RowChunks<T>(rows.count, a.channels)
        .run(
            [&](int row, int64_t c) {
              const Span span = members.spans[row];
              return span.begin < span.end ? input(span.begin, c) : Chunk<T>{};
            },
            [&](int row, int64_t c, const Chunk<T>& chunk) {
              T* out = static_cast<T*>(a.out) + (rows.image * a.kept + rows.first + row) * a.channels;
              store_chunk(mean(members.spans[row], c, chunk), out, c, a.channels, kAligned);
            });
  }
};

template <class T, bool kAligned, Residual kResidual>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, kAligned>))
    merge_reduce_kernel(MergeReduceArgs a, RowParts parts) {
  const PartOfRows rows(parts, a.kept);
  Shared shared(shared_memory());
  const Members<Wide<T>> members(shared, a, rows.count);
  members.find(a, rows);
  MergeReduce<T, kAligned, kResidual>{a, rows, members}.run();
}

// What a token gets of its destination's gradient.
template <class W>
struct Share {
  int from;  // -1: it went nowhere
  W part;
};

// The share of the token that is this thread's row. Every token of the destination counts.
template <class W>
__device__ Share<W> share_of(const MergeReduceArgs& a, const PartOfRows& rows, const TokensAtOnce<W>& tokens) {
  const int row = static_cast<int>(threadIdx.x);
  const bool has_row = row < rows.count;
  const uint32_t to = has_row ? destination_of(a, rows.image, rows.first + row) : kNowhere;
  const W weight = has_row ? size_of<W>(a.weights, rows.image, rows.first + row) : W(0);
  W total = 0;
  for (int64_t first = 0; first < a.tokens; first += kTokensAtOnce) {
    const int count = static_cast<int>(a.tokens - first < kTokensAtOnce ? a.tokens - first : kTokensAtOnce);
    if (first > 0) __syncthreads();  // what was there has been read
    tokens.fill(a, rows.image, first, count);
    __syncthreads();
    if (to == kNowhere) continue;
    for (int j = 0; j < padded_keys(count); j += kKeysAtOnce) {
      const auto group = *reinterpret_cast<const KeyGroup<uint32_t>*>(tokens.to + j);
      const auto weights = *reinterpret_cast<const KeyGroup<W>*>(tokens.weights + j);
#pragma unroll
      for (int i = 0; i < kKeysAtOnce; ++i)
        if (group.keys[i] == to) total += weights.keys[i];
    }
  }
  return to == kNowhere || total == 0 ? Share<W>{-1, 0} : Share<W>{static_cast<int>(to), weight / total};
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, kAligned>))
    merge_reduce_backward_kernel(MergeReduceArgs a, RowParts parts) {
  using W = Wide<T>;
  const PartOfRows rows(parts, a.tokens);
  Shared shared(shared_memory());
  const TokensAtOnce<W> tokens(shared, a);
  Share<W>* shares = shared.take<Share<W>>(rows.count);
  const Share<W> own = share_of(a, rows, tokens);
  if (static_cast<int>(threadIdx.x) < rows.count) shares[threadIdx.x] = own;
  __syncthreads();
  RowChunks<T>(rows.count, a.channels)
      .run(
          [&](int row, int64_t c) {
            const int from = shares[row].from;
            return from < 0 ? Chunk<T>{} : load_chunk(row_of<T>(a.x, rows.image, from), c, a.channels, kAligned);
          },
          [&](int row, int64_t c, const Chunk<T>& whole) {
            W part[Chunk<T>::kCount];
#pragma unroll
            for (int i = 0; i < Chunk<T>::kCount; ++i) part[i] = whole[i] * shares[row].part;
            T* out = static_cast<T*>(a.out) + (rows.image * a.tokens + rows.first + row) * a.channels;
            store_chunk(Chunk<T>::of(part), out, c, a.channels, kAligned);
          });
}

// Shared memory of a block with kMostRows rows.
template <class W>
int64_t shared_bytes(const MergeReduceArgs& a, bool backward) {
  Shared shared(nullptr);
  if (backward) {
    TokensAtOnce<W> tokens(shared, a);
    shared.take<Share<W>>(kMostRows);
  } else {
    Members<W> members(shared, a, kMostRows);
  }
  return shared.bytes();
}

template <class T>
const char* run(const MergeReduceArgs& a, bool backward, Stream stream) {
  auto is_aligned = [&](const Tokens& x) {
    return aligned_rows<T>(x.data, a.channels, x.stride_image, x.stride_token);
  };
  const bool has_residual = a.residual.data != nullptr;
  const bool aligned = is_aligned(a.x) && (!has_residual || is_aligned(a.residual)) && is_aligned({a.out, 0, 0});
  if (!backward && a.tokens > kTokensAtOnce) return merge_reduce_search<T>(a, aligned, stream);
  const RowParts parts = parts_of_rows(a.images, backward ? a.tokens : a.kept, kMostRows);
  const auto kernel = backward
                          ? aligned ? merge_reduce_backward_kernel<T, true> : merge_reduce_backward_kernel<T, false>
                      : !aligned     ? merge_reduce_kernel<T, false, Residual::perhaps>
                      : has_residual ? merge_reduce_kernel<T, true, Residual::yes>
                                     : merge_reduce_kernel<T, true, Residual::no>;
  return launch(kernel, a.images * parts.blocks, kThreads, shared_bytes<Wide<T>>(a, backward), stream, a, parts);
}

}  // namespace

const char* merge_reduce(const MergeReduceArgs& a, const Scratch&, void* stream) {
  return dispatch(a.type, [&](auto example) { return run<decltype(example)>(a, false, static_cast<Stream>(stream)); });
}

const char* merge_reduce_backward(const MergeReduceArgs& a, const Scratch&, void* stream) {
  return dispatch(a.type, [&](auto example) { return run<decltype(example)>(a, true, static_cast<Stream>(stream)); });
}

}  // namespace diffrate::cuda
