// What the kernels of masked_attention's gradients share; csrc/cpu/masked_attention.cpp has the formulas as plain
// loops. Nothing but the inputs is kept from the forward pass, and no N x N map exists. Three kernels:
//
// 1. masked_attention_query_gradients.cuh. Rows are queries. A block goes over the keys twice, a tile at a time: first
//    for each query's largest logit, 1 / Z and delta, which it writes down; then for the gradient of its logits and,
//    with that, grad_q.
// 2. masked_attention_key_gradients.cuh. Rows are keys. A block goes once over the queries and their statistics:
//    grad_k, grad_v, one head's grad_mask.
// 3. masked_attention_backward.cu. grad_mask is added up over heads.
//
// All sums have a fixed order: no atomics, the same result every time.
//
// Operations: a product of a head is 2 N^2 D of them. Kernel 1 takes five (q k^T and grad v^T, both again, and the one
// with k), kernel 2 four (the same two, and those with grad and q): nine. Five would do if e and dA were written down:
// at D = 64 that saves 512 operations for each of the B H N^2 pairs and costs 24 bytes to write and read again, no gain
// on tensor cores that do a hundred operations and more in the time of a byte, and memory would no longer be O(N). Two
// are the statistics', and would be saved if the forward pass kept its result and sums in every block of the network
// until the backward pass. One would be saved by taking grad_q apart into (e P dA) k - delta (e P) k, which needs one
// loop: but these two nearly cancel where attention is sharp, and weights are rounded to half precision.
//
// Half precision: the weights of the second products are rounded to it. So that none of them vanishes or overflows,
// however small or large a loss makes the gradients, they are brought to a magnitude that it holds well: delta is a
// mean of dA, so that no gradient of a query's logits exceeds twice its largest |dA|, which kernel 1 finds in its first
// loop and hands to kernel 2.
#pragma once

#include <float.h>

#include "cuda/attention_rows.cuh"

namespace diffrate::cuda {

// Half precision multiplies attention after it is brought below this, and gradients of logits after they are brought
// below twice this.
constexpr float kMostAttention = 8192, kMostGradient = 8192;

// How a kernel divides its work. A block has kWarps warps of 16 kRows rows; of the other operands kTile rows are in
// shared memory at a time, of which 8 kTiles are worked on in registers. kBlocks blocks are to share the registers of a
// multiprocessor.
template <int kRows_, int kTiles_, int kTile_, int kWarps_, int kBlocks_>
struct Shape {
  static constexpr int kRows = kRows_, kTiles = kTiles_, kTile = kTile_, kWarps = kWarps_, kBlocks = kBlocks_;
  static constexpr int kThreads = kWarps * kWarp, kWarpRows = 16 * kRows, kBlockRows = kWarps * kWarpRows;
  static constexpr int kColumns = 8 * kTiles;
  static_assert(kTile % kColumns == 0);
};

// What the registers and the shared memory of a multiprocessor hold (ptxas -v): more rows to a warp mean fewer reads of
// shared memory for an operation, more warps hide more latency.
template <class T, int kDepth>
struct Shapes {  // half precision
  using Queries = Shape<1, 4, kDepth <= 80 ? 64 : 32, 4, kDepth <= 80 ? 3 : 2>;
  using Keys = Shape<1, kDepth <= 80 ? 4 : 2, kDepth <= 80 ? 64 : 32, 4, kDepth <= 64 ? 3 : 2>;
};
template <int kDepth>
struct Shapes<float, kDepth> {
  using Queries = Shape<kDepth <= 64 ? 2 : 1, 2, 16, kDepth <= 80 ? 4 : 2, 2>;
  using Keys = Queries;
};
template <int kDepth>
struct Shapes<double, kDepth> {
  using Queries = Shape<1, 2, 16, 2, 1>;
  using Keys = Queries;
};

// What kernels 1 and 2 leave behind: arrays over (B, H, N).
template <class W>
struct Statistics {
  W *top, *inverse, *delta;  // of a query: its largest logit, 1 / Z, and delta
  W* largest;                // of a query, in half precision: the largest |dA|
  W* grad_mask;              // of a key
  int64_t bytes;
  __host__ __device__ Statistics(void* scratch, int64_t count) {
    W* base = static_cast<W*>(scratch);
    top = base;
    inverse = base + count;
    delta = base + 2 * count;
    largest = base + 3 * count;
    grad_mask = base + 4 * count;
    bytes = 5 * count * static_cast<int64_t>(sizeof(W));
  }
};

// What can be read, or written, 16 bytes at a time.
struct Aligned {
  bool q, k, v, grad, out;
};

// Two matrices of a head: q and grad of queries, k and v of keys. Logits are the products of their first, gradients of
// attention those of their second.
template <class T>
struct Operands {
  const T *first, *second;  // token 0
  int64_t first_stride, second_stride;
  bool first_aligned, second_aligned;

  __device__ Operands(const Heads& a, bool a_aligned, const Heads& b, bool b_aligned, int64_t image, int64_t head)
      : first(head_of<T>(a, image, head)),
        second(head_of<T>(b, image, head)),
        first_stride(a.stride_token),
        second_stride(b.stride_token),
        first_aligned(a_aligned),
        second_aligned(b_aligned) {}

  // Starts to copy kCount rows of both, from `token` on.
  template <int kDepth, int kCount, int kThreads>
  __device__ void fetch(T* to_first, T* to_second, int token, const AttentionArgs& a) const {
    copy<kDepth, kCount, kThreads>(to_first, first, first_stride, first_aligned, token, a);
    copy<kDepth, kCount, kThreads>(to_second, second, second_stride, second_aligned, token, a);
  }

  // fetch_rows, but where the number of threads is a multiple of a row's chunks, which a thread then always copies the
  // same of: addresses are cheap. Otherwise they are a third of a kernel's instructions.
  template <int kDepth, int kCount, int kThreads>
  __device__ static void copy(T* to, const T* head, int64_t stride, bool aligned, int token, const AttentionArgs& a) {
    constexpr int kChunks = kDepth / Chunk<T>::kCount, kStep = kThreads / kChunks;
    const int head_dim = static_cast<int>(a.head_dim);
    if (kThreads % kChunks != 0 || kCount % kStep != 0 || !aligned) {
      fetch_rows<T, kDepth>(to, kCount, head, stride, token, a.tokens, head_dim, aligned);
      return;
    }
    const int first_row = static_cast<int>(threadIdx.x / kChunks), rows = static_cast<int>(a.tokens) - token;
    const int c = static_cast<int>(threadIdx.x % kChunks) * Chunk<T>::kCount;
    const T* from = head + (token + first_row) * stride + c;
    T* at = to + first_row * stride_of<T, kDepth> + c;
#pragma unroll
    for (int row = 0; row < kCount; row += kStep, from += kStep * stride, at += kStep * stride_of<T, kDepth>)
      copy_async(at, from, first_row + row < rows && c < head_dim);
  }
};

// Shared memory of kernels 1 and 2: the block's own rows, and two tiles of the other operands with some `Facts` about
// each of their rows. One tile is worked on while the next arrives.
template <class T, int kDepth, class S, class Facts>
struct BackwardShared {
  static constexpr int kStride = stride_of<T, kDepth>;
  static constexpr int kWeights = weights_buffer<T, S::kRows, S::kTiles>;
  T *own_first, *own_second, *tiles, *weights;
  Facts* facts;
  Wide<T>* partial;  // one number for each warp
  int64_t bytes;

  __host__ __device__ explicit BackwardShared(unsigned char* base) {
    Shared shared(base);
    own_first = shared.take<T>(S::kBlockRows * kStride);
    own_second = shared.take<T>(S::kBlockRows * kStride);
    tiles = shared.take<T>(4 * S::kTile * kStride);
    facts = shared.take<Facts>(2 * S::kTile);
    weights = shared.take<T>(S::kWarps * kWeights);
    partial = shared.take<Wide<T>>(S::kWarps);
    bytes = shared.bytes();
  }

  __device__ T* first_of(int step) const { return tiles + step % 2 * 2 * S::kTile * kStride; }
  __device__ T* second_of(int step) const { return first_of(step) + S::kTile * kStride; }
  __device__ Facts* facts_of(int step) const { return facts + step % 2 * S::kTile; }
  __device__ T* own_weights() const { return weights + warp_id() * kWeights; }
  __device__ static int own_offset() { return warp_id() * S::kWarpRows * kStride; }  // of the warp in the own rows

  // Starts to fetch what `step` works on, the tile of rows from `token` on. `describe(token)` gives the facts.
  template <class Describe>
  __device__ void fetch(int step, const Operands<T>& from, int token, const AttentionArgs& a, Describe describe) const {
    from.template fetch<kDepth, S::kTile, S::kThreads>(first_of(step), second_of(step), token, a);
    for (int i = static_cast<int>(threadIdx.x); i < S::kTile; i += S::kThreads) facts_of(step)[i] = describe(token + i);
    copy_commit();
  }
};

// Column n * 8 + i % 2 of this lane's fragments is the token of row (r, h) itself where it equals this. The columns are
// the tokens from `first_column` on, the lane's from `first_column` + 2 * (lane % 4).
template <class Rows>
__device__ inline int own_column(const Rows& at, int r, int h, int first_column) {
  return at.token(r, h) - first_column - lane_id() % 4 * 2;
}

// out = the dot products of the warp's rows with rows at `columns`.
template <class T, class S, int kDepth>
__device__ inline void products(Wide<T> (&out)[S::kRows][S::kTiles][4], const Left<T, S::kRows, kDepth>& rows,
                                const T* columns) {
  for_fragment<S::kRows, S::kTiles>([&](int r, int n, int i) { out[r][n][i] = 0; });
  multiply_rows<T, S::kRows, kDepth, S::kTiles>(out, rows, columns);
}

template <class T, class S, int kDepth>
__device__ __forceinline__ void scale_rows(Wide<T> (&out)[S::kRows][kDepth / 8][4],
                                           const Wide<T> (&factor)[S::kRows][2]) {
  for_fragment<S::kRows, kDepth / 8>([&](int r, int n, int i) { out[r][n][i] *= factor[r][i / 2]; });
}

// Writes gradients of the warp's rows; `stage` is the warp's, for all its rows.
template <class T, class S, int kDepth, class Rows>
__device__ __forceinline__ void write_gradient(void* to, const Wide<T> (&gradient)[S::kRows][kDepth / 8][4],
                                               const Rows& at, const AttentionArgs& a, bool aligned, T* stage) {
  store_rows<T, S::kRows, kDepth>(head_of<T>(to, at.image, at.head, a), a.heads * a.head_dim, at.warp_row, a.tokens,
                                  static_cast<int>(a.head_dim), aligned, gradient, stage);
}

// What brings gradients of logits to a good magnitude, given the largest |dA|.
template <class T, class W>
__device__ inline W gradient_unit(W largest) {
  if constexpr (!kTensorCores<T>) return 1;
  return kMostGradient / (largest > W(1e-30) ? largest : W(1e-30));
}

}  // namespace diffrate::cuda
