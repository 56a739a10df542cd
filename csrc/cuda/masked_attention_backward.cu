// Gradients of masked attention; csrc/cpu/masked_attention.cpp has the formulas as plain loops. Nothing but the inputs
// is kept from the forward pass, and no N x N map exists. Three kernels:
//
//   1. Rows are queries. A block goes twice over the keys, a tile at a time: first for each query's largest logit,
//      1 / Z and delta, which it writes down; then for the gradient of its logits and, with that, grad_q.
//   2. Rows are keys. A block goes once over the queries and their statistics: grad_k, grad_v, one head's grad_mask.
//   3. grad_mask is added up over heads. All sums have a fixed order: no atomics, the same result every time.
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
// mean of dA, so that no gradient of a query's logits exceeds twice its largest |dA|, which kernel 1 knows after its
// first loop and hands to kernel 2.
#include <float.h>

#include "cuda/attention.cuh"

namespace diffrate::cuda {
namespace {

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
  __device__ void fetch(T* to_first, T* to_second, int token, const MaskedAttentionArgs& a) const {
    copy<kDepth, kCount, kThreads>(to_first, first, first_stride, first_aligned, token, a);
    copy<kDepth, kCount, kThreads>(to_second, second, second_stride, second_aligned, token, a);
  }

  // fetch_rows, but where the number of threads is a multiple of a row's chunks, which a thread then always copies the
  // same of: addresses are cheap. Otherwise they are a third of a kernel's instructions.
  template <int kDepth, int kCount, int kThreads>
  __device__ static void copy(T* to, const T* head, int64_t stride, bool aligned, int token,
                              const MaskedAttentionArgs& a) {
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

// Shared memory of kernels 1 and 2: the block's own rows and two tiles of the other operands, each row with what is
// `Known` of it. One tile is worked on while the next arrives.
template <class T, int kDepth, class S, class Known>
struct Memory {
  static constexpr int kStride = stride_of<T, kDepth>;
  static constexpr int kWeights = weights_buffer<T, S::kRows, S::kTiles>;
  T *own_first, *own_second, *tiles, *weights;
  Known* known;
  Wide<T>* partial;  // one number for each warp
  int64_t bytes;

  __host__ __device__ explicit Memory(unsigned char* base) {
    Shared shared(base);
    own_first = shared.take<T>(S::kBlockRows * kStride);
    own_second = shared.take<T>(S::kBlockRows * kStride);
    tiles = shared.take<T>(4 * S::kTile * kStride);
    known = shared.take<Known>(2 * S::kTile);
    weights = shared.take<T>(S::kWarps * kWeights);
    partial = shared.take<Wide<T>>(S::kWarps);
    bytes = shared.bytes();
  }

  __device__ T* first_of(int step) const { return tiles + step % 2 * 2 * S::kTile * kStride; }
  __device__ T* second_of(int step) const { return first_of(step) + S::kTile * kStride; }
  __device__ Known* known_of(int step) const { return known + step % 2 * S::kTile; }

  // Starts to fetch what `step` works on, the tile of rows from `token` on.
  template <class Know>
  __device__ void fetch(int step, const Operands<T>& from, int token, const MaskedAttentionArgs& a, Know know) const {
    from.template fetch<kDepth, S::kTile, S::kThreads>(first_of(step), second_of(step), token, a);
    for (int i = static_cast<int>(threadIdx.x); i < S::kTile; i += S::kThreads) known_of(step)[i] = know(token + i);
    copy_commit();
  }
};

// Where a block works, and a warp of it.
template <class T, int kDepth, class S>
struct Place {
  int64_t head_of_all, image, head;
  int block_row, warp_row;  // the first of the block, and of the warp
  int warp_offset;          // of the warp's rows in shared memory

  __device__ explicit Place(const MaskedAttentionArgs& a) {
    unsigned blocks = static_cast<unsigned>((a.tokens + S::kBlockRows - 1) / S::kBlockRows);
    head_of_all = blockIdx.x / blocks;
    image = head_of_all / a.heads;
    head = head_of_all % a.heads;
    block_row = static_cast<int>(blockIdx.x % blocks) * S::kBlockRows;
    warp_row = block_row + warp_id() * S::kWarpRows;
    warp_offset = warp_id() * S::kWarpRows * stride_of<T, kDepth>;
  }

  // The token of row h = 0, 1 of row tile r in this lane.
  __device__ int token(int r, int h) const { return warp_row + r * 16 + h * 8 + lane_id() / 4; }
  // Column n * 8 + i % 2 of this lane's fragments is the token of row (r, h) itself where it equals this; the lane's
  // first column is that of token `first_column` + 2 * (lane % 4).
  __device__ int own_column(int r, int h, int first_column) const {
    return token(r, h) - first_column - lane_id() % 4 * 2;
  }
};

// out = the dot products of the warp's rows with rows at `columns`.
template <class T, class S, int kDepth>
__device__ inline void products(Wide<T> (&out)[S::kRows][S::kTiles][4], const Left<T, S::kRows, kDepth>& rows,
                                const T* columns) {
#pragma unroll
  for (int r = 0; r < S::kRows; ++r)
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[r][n][i] = 0;
  multiply_rows<T, S::kRows, kDepth, S::kTiles>(out, rows, columns);
}

// Calls body(r, n, i) for every number of a fragment.
template <class S, class Body>
__device__ inline void for_fragment(Body body) {
#pragma unroll
  for (int r = 0; r < S::kRows; ++r)
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) body(r, n, i);
}

template <class T, class S, int kDepth>
__device__ void scale_rows(Wide<T> (&out)[S::kRows][kDepth / 8][4], const Wide<T> (&factor)[S::kRows][2]) {
#pragma unroll
  for (int r = 0; r < S::kRows; ++r)
#pragma unroll
    for (int n = 0; n < kDepth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[r][n][i] *= factor[r][i / 2];
}

// What brings gradients of logits to a good magnitude, given the largest |dA|.
template <class T, class W>
__device__ inline W gradient_unit(W largest) {
  if constexpr (!kTensorCores<T>) return 1;
  return kMostGradient / (largest > W(1e-30) ? largest : W(1e-30));
}

template <class W>
struct Key {
  W bias, mask;
};

// --- kernel 1

template <class T, int kDepth>
__global__ void __launch_bounds__(Shapes<T, kDepth>::Queries::kThreads, Shapes<T, kDepth>::Queries::kBlocks)
    query_gradients(MaskedAttentionArgs a, Aligned aligned, void* scratch) {
  using W = Wide<T>;
  using S = typename Shapes<T, kDepth>::Queries;
  Place<T, kDepth, S> place(a);
  Memory<T, kDepth, S, Key<W>> memory(shared_memory());
  Operands<T> own(a.q, aligned.q, a.grad, aligned.grad, place.image, place.head);
  Operands<T> keys(a.k, aligned.k, a.v, aligned.v, place.image, place.head);
  auto know = [&](int64_t token) {
    return Key<W>{bias_of_key<W>(a.size, place.image, token, a.tokens),
                  mask_of_key<W>(a.mask, place.image, token, a.tokens)};
  };

  own.template fetch<kDepth, S::kBlockRows, S::kThreads>(memory.own_first, memory.own_second, place.block_row, a);
  memory.fetch(0, keys, 0, a, know);
  copy_wait<0>();
  __syncthreads();
  Left<T, S::kRows, kDepth> queries(memory.own_first + place.warp_offset);
  Left<T, S::kRows, kDepth> grads(memory.own_second + place.warp_offset);

  const int tokens = static_cast<int>(a.tokens), tiles = (tokens + S::kTile - 1) / S::kTile;
  const W scale = static_cast<W>(a.scale * kLog2OfE), floor = static_cast<W>(kMaskedEpsilon / a.tokens);
  int step = 0;
  W logits[S::kRows][S::kTiles][4], change[S::kRows][S::kTiles][4];

  // Calls body(keys at the columns, what is known of them, row r's own column, the columns' rows of k) for all columns
  auto over_keys = [&](auto body) {
    for (int tile = 0; tile < tiles; ++tile, ++step) {
      copy_wait<0>();
      __syncthreads();  // this tile is there, and nobody reads the one before any more
      if (step + 1 < 2 * tiles) memory.fetch(step + 1, keys, (tile + 1) % tiles * S::kTile, a, know);
      if (place.warp_row >= tokens) continue;
#pragma unroll 1
      for (int c = 0; c < S::kTile && tile * S::kTile + c < tokens; c += S::kColumns) {
        const T* columns = memory.first_of(step) + c * memory.kStride;
        products<T, S, kDepth>(logits, queries, columns);
        products<T, S, kDepth>(change, grads, memory.second_of(step) + c * memory.kStride);
        const Key<W>* known = memory.known_of(step) + c + lane_id() % 4 * 2;
        int own_column[S::kRows][2];
#pragma unroll
        for (int r = 0; r < S::kRows; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) own_column[r][h] = place.own_column(r, h, tile * S::kTile + c);
        for_fragment<S>(
            [&](int r, int n, int i) { logits[r][n][i] = logits[r][n][i] * scale + known[n * 8 + i % 2].bias; });
        auto visible = [&](int r, int n, int i) {
          return n * 8 + i % 2 == own_column[r][i / 2] ? W(1) : known[n * 8 + i % 2].mask;
        };
        body(visible, columns);
      }
    }
  };

  // Each lane has its own largest logit and sums, over its own columns, until the end. FLT_MAX, not infinity: a lane
  // may have seen no key but those past the last.
  W top[S::kRows][2], seen[S::kRows][2] = {}, product[S::kRows][2] = {}, sum[S::kRows][2] = {},
                      largest[S::kRows][2] = {};
#pragma unroll
  for (int r = 0; r < S::kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) top[r][h] = -FLT_MAX;
  over_keys([&](auto visible, const T*) {
    W before[S::kRows][2];
#pragma unroll
    for (int r = 0; r < S::kRows; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) before[r][h] = top[r][h];
    for_fragment<S>([&](int r, int n, int i) { top[r][i / 2] = greater(logits[r][n][i], top[r][i / 2]); });
#pragma unroll
    for (int r = 0; r < S::kRows; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        W factor = power_of_two(before[r][h] - top[r][h]);
        seen[r][h] *= factor;
        product[r][h] *= factor;
      }
    for_fragment<S>([&](int r, int n, int i) {
      W weight = power_of_two(logits[r][n][i] - top[r][i / 2]) * visible(r, n, i), x = change[r][n][i];
      seen[r][i / 2] += weight;
      product[r][i / 2] += weight * x;
      sum[r][i / 2] += x;
      if constexpr (kTensorCores<T>) largest[r][i / 2] = greater(fabsf(x), largest[r][i / 2]);
    });
  });

  Statistics<W> statistics(scratch, a.images * a.heads * a.tokens);
  W unit[S::kRows][2], delta_unit[S::kRows][2], factor[S::kRows][2];
#pragma unroll
  for (int r = 0; r < S::kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      W highest = row_max(top[r][h]), adjust = power_of_two(top[r][h] - highest);
      W inverse = 1 / (row_sum(seen[r][h] * adjust) + W(kMaskedEpsilon));
      top[r][h] = highest;
      W delta = (row_sum(product[r][h] * adjust) + floor * row_sum(sum[r][h])) * inverse;
      W most = row_max(largest[r][h]);
      unit[r][h] = inverse * gradient_unit<T>(most);
      delta_unit[r][h] = delta * unit[r][h];
      factor[r][h] = static_cast<W>(a.scale) / gradient_unit<T>(most);
      int token = place.token(r, h);
      if (lane_id() % 4 != 0 || token >= tokens) continue;
      int64_t at = place.head_of_all * a.tokens + token;
      statistics.top[at] = highest;
      statistics.inverse[at] = inverse;
      statistics.delta[at] = delta;
      if constexpr (kTensorCores<T>) statistics.largest[at] = most;
    }

  W grad_q[S::kRows][kDepth / 8][4] = {};
  over_keys([&](auto visible, const T* columns) {
    for_fragment<S>([&](int r, int n, int i) {
      W weight = power_of_two(logits[r][n][i] - top[r][i / 2]) * visible(r, n, i);
      logits[r][n][i] = weight * (change[r][n][i] * unit[r][i / 2] - delta_unit[r][i / 2]);
    });
    Weights<T, S::kRows, S::kTiles> weights(logits, memory.weights + warp_id() * memory.kWeights);
    multiply_columns<T, S::kRows, S::kTiles, kDepth>(grad_q, weights, columns);
  });
  scale_rows<T, S, kDepth>(grad_q, factor);
  store_rows<T, S::kRows, kDepth>(head_of<T>(a.grad_q, place.image, place.head, a), a.heads * a.head_dim,
                                  place.warp_row, a.tokens, static_cast<int>(a.head_dim), aligned.out, grad_q,
                                  memory.own_first + place.warp_offset);
}

// --- kernel 2

template <class W>
struct alignas(4 * sizeof(W)) Query {
  W top;
  W attention, gradient;  // 1 / Z times what brings attention, and gradients of logits, to a good magnitude
  W delta;                // times `gradient`
};

// The largest of the numbers that are finite, in every thread of the block.
template <int kWarps, class W>
__device__ W largest_of(const W* numbers, int64_t count, W* partial) {
  W largest = 0;
  for (int64_t i = threadIdx.x; i < count; i += kWarps * kWarp)
    if (numbers[i] > largest && numbers[i] <= W(FLT_MAX)) largest = numbers[i];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    W other = __shfl_xor_sync(kAllLanes, largest, offset);
    largest = other > largest ? other : largest;
  }
  if (lane_id() == 0) partial[warp_id()] = largest;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) largest = partial[i] > largest ? partial[i] : largest;
  return largest;
}

template <class T, int kDepth>
__global__ void __launch_bounds__(Shapes<T, kDepth>::Keys::kThreads, Shapes<T, kDepth>::Keys::kBlocks)
    key_gradients(MaskedAttentionArgs a, Aligned aligned, void* scratch) {
  using W = Wide<T>;
  using S = typename Shapes<T, kDepth>::Keys;
  Place<T, kDepth, S> place(a);
  Memory<T, kDepth, S, Query<W>> memory(shared_memory());
  Operands<T> own(a.k, aligned.k, a.v, aligned.v, place.image, place.head);
  Operands<T> queries(a.q, aligned.q, a.grad, aligned.grad, place.image, place.head);
  own.template fetch<kDepth, S::kBlockRows, S::kThreads>(memory.own_first, memory.own_second, place.block_row, a);
  copy_commit();

  Statistics<W> statistics(scratch, a.images * a.heads * a.tokens);
  const int64_t first = place.head_of_all * a.tokens;
  W attention_unit = 1, unit = 1;
  if constexpr (kTensorCores<T>) {
    attention_unit = kMostAttention;
    unit = gradient_unit<T>(largest_of<S::kWarps>(statistics.largest + first, a.tokens, memory.partial));
  }
  auto know = [&](int64_t token) {
    if (token >= a.tokens) return Query<W>{FLT_MAX, 0, 0, 0};  // whatever the logit: its exponential is 0
    W inverse = statistics.inverse[first + token];
    return Query<W>{statistics.top[first + token], inverse * attention_unit, inverse * unit,
                    statistics.delta[first + token] * (inverse * unit)};
  };
  memory.fetch(0, queries, 0, a, know);
  copy_wait<0>();
  __syncthreads();
  Left<T, S::kRows, kDepth> keys(memory.own_first + place.warp_offset);
  Left<T, S::kRows, kDepth> values(memory.own_second + place.warp_offset);

  const W scale = static_cast<W>(a.scale * kLog2OfE), floor = static_cast<W>(kMaskedEpsilon / a.tokens);
  W bias[S::kRows][2], mask[S::kRows][2], grad_mask[S::kRows][2] = {};
#pragma unroll
  for (int r = 0; r < S::kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      bias[r][h] = bias_of_key<W>(a.size, place.image, place.token(r, h), a.tokens);
      mask[r][h] = mask_of_key<W>(a.mask, place.image, place.token(r, h), a.tokens);
    }
  W grad_k[S::kRows][kDepth / 8][4] = {}, grad_v[S::kRows][kDepth / 8][4] = {};
  W logits[S::kRows][S::kTiles][4], change[S::kRows][S::kTiles][4];

  const int tokens = static_cast<int>(a.tokens), tiles = (tokens + S::kTile - 1) / S::kTile;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before any more
    if (tile + 1 < tiles) memory.fetch(tile + 1, queries, (tile + 1) * S::kTile, a, know);
    if (place.warp_row >= tokens) continue;
#pragma unroll 1
    for (int c = 0; c < S::kTile && tile * S::kTile + c < tokens; c += S::kColumns) {
      const T* query_rows = memory.first_of(tile) + c * memory.kStride;
      const T* grad_rows = memory.second_of(tile) + c * memory.kStride;
      products<T, S, kDepth>(logits, keys, query_rows);
      products<T, S, kDepth>(change, values, grad_rows);
      const Query<W>* known = memory.known_of(tile) + c + lane_id() % 4 * 2;
      int own_column[S::kRows][2];
#pragma unroll
      for (int r = 0; r < S::kRows; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) own_column[r][h] = place.own_column(r, h, tile * S::kTile + c);
      for_fragment<S>([&](int r, int n, int i) {
        Query<W> query = known[n * 8 + i % 2];
        W e = power_of_two(logits[r][n][i] * scale + bias[r][i / 2] - query.top);
        W x = change[r][n][i] * query.gradient - query.delta;
        bool itself = n * 8 + i % 2 == own_column[r][i / 2];
        W seen = itself ? e : e * mask[r][i / 2];
        if (!itself) grad_mask[r][i / 2] += e * x;  // what a token sees of itself is no matter of its mask
        change[r][n][i] = seen * x;
        logits[r][n][i] = seen * query.attention + floor * query.attention;
      });
      T* buffer = memory.weights + warp_id() * memory.kWeights;
      multiply_columns<T, S::kRows, S::kTiles, kDepth>(grad_v, Weights<T, S::kRows, S::kTiles>(logits, buffer),
                                                       grad_rows);
      multiply_columns<T, S::kRows, S::kTiles, kDepth>(grad_k, Weights<T, S::kRows, S::kTiles>(change, buffer),
                                                       query_rows);
    }
  }

  W factor_k[S::kRows][2], factor_v[S::kRows][2];
#pragma unroll
  for (int r = 0; r < S::kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factor_k[r][h] = static_cast<W>(a.scale) / unit;
      factor_v[r][h] = 1 / attention_unit;
      W total = row_sum(grad_mask[r][h]) / unit;
      if (lane_id() % 4 == 0 && place.token(r, h) < a.tokens) statistics.grad_mask[first + place.token(r, h)] = total;
    }
  scale_rows<T, S, kDepth>(grad_k, factor_k);
  scale_rows<T, S, kDepth>(grad_v, factor_v);
  auto store = [&](void* to, const W(&from)[S::kRows][kDepth / 8][4]) {
    store_rows<T, S::kRows, kDepth>(head_of<T>(to, place.image, place.head, a), a.heads * a.head_dim, place.warp_row,
                                    a.tokens, static_cast<int>(a.head_dim), aligned.out, from,
                                    memory.own_first + place.warp_offset);
  };
  store(a.grad_k, grad_k);
  store(a.grad_v, grad_v);
}

// --- kernel 3

constexpr int kSumThreads = 256;

template <class W>
__global__ void __launch_bounds__(kSumThreads) sum_over_heads(MaskedAttentionArgs a, void* scratch) {
  int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= a.images * a.tokens) return;
  const W* rows = Statistics<W>(scratch, a.images * a.heads * a.tokens).grad_mask;
  int64_t image = at / a.tokens, token = at % a.tokens;
  W sum = 0;
  for (int64_t head = 0; head < a.heads; ++head) sum += rows[(image * a.heads + head) * a.tokens + token];
  static_cast<W*>(a.grad_mask)[at] = sum;
}

// Starts kernel 1 or 2.
template <class T, int kDepth, class S, class Known>
const char* start(void (*kernel)(MaskedAttentionArgs, Aligned, void*), const MaskedAttentionArgs& a, Aligned aligned,
                  void* scratch, Stream stream) {
  int64_t blocks = (a.tokens + S::kBlockRows - 1) / S::kBlockRows;
  return launch(kernel, a.images * a.heads * blocks, S::kThreads, Memory<T, kDepth, S, Known>(nullptr).bytes, stream, a,
                aligned, scratch);
}

}  // namespace

int64_t masked_attention_backward_scratch_bytes(const MaskedAttentionArgs& a) {
  int64_t count = a.images * a.heads * a.tokens;
  return a.type == Type::f64 ? Statistics<double>(nullptr, count).bytes : Statistics<float>(nullptr, count).bytes;
}

const char* masked_attention_backward(const MaskedAttentionArgs& a, void* scratch, void* stream) {
  return dispatch_heads(a.type, a.head_dim, [&](auto example, auto depth) -> const char* {
    using T = decltype(example);
    using W = Wide<T>;
    constexpr int kDepth = depth;
    Stream on = static_cast<Stream>(stream);
    Aligned aligned{aligned_heads<T>(a.q, a.head_dim), aligned_heads<T>(a.k, a.head_dim),
                    aligned_heads<T>(a.v, a.head_dim), aligned_heads<T>(a.grad, a.head_dim), true};
    for (void* out : {a.grad_q, a.grad_k, a.grad_v})
      aligned.out = aligned.out && aligned_rows<T>(out, a.head_dim, a.head_dim, a.head_dim);
    using Queries = typename Shapes<T, kDepth>::Queries;
    using Keys = typename Shapes<T, kDepth>::Keys;
    const char* error = start<T, kDepth, Queries, Key<W>>(query_gradients<T, kDepth>, a, aligned, scratch, on);
    if (error == nullptr) error = start<T, kDepth, Keys, Query<W>>(key_gradients<T, kDepth>, a, aligned, scratch, on);
    if (error != nullptr) return error;
    int64_t blocks = (a.images * a.tokens + kSumThreads - 1) / kSumThreads;
    return launch(sum_over_heads<W>, blocks, kSumThreads, 0, on, a, scratch);
  });
}

}  // namespace diffrate::cuda
