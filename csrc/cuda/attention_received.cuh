// The sums of the attention map's columns, without the map: logits are computed once more, now with the keys as the
// rows of a warp and queries streaming by.
#pragma once

#include "cuda/attention_forward.cuh"

namespace diffrate::cuda {

template <class T_, int kDepth_, bool kMasked_>
struct ReceivedConfig {
  using T = T_;
  using W = Wide<T>;
  static constexpr int kDepth = kDepth_;
  static constexpr bool kMasked = kMasked_;

  static constexpr int kRows = kRowTiles<T, kDepth>;  // tiles of 16 keys that a warp works on
  static constexpr int kWarpRows = 16 * kRows, kBlockRows = kAttentionWarps * kWarpRows;
  static constexpr int kQueries = kKeyTile<T, kDepth>;       // in a buffer
  static constexpr int kTiles = kKeysAtOnce<T, kDepth> / 8;  // tiles of 8 queries that a warp works on at once
  static constexpr int kStride = stride_of<T, kDepth>;
  static constexpr int kBuffer = kQueries * kStride;  // numbers
};

template <class C>
struct ReceivedShared {
  using T = typename C::T;
  using W = typename C::W;

  T* keys;                  // (kBlockRows, stride)
  T* queries;               // two buffers
  W *base, *share, *floor;  // (2, kQueries): share and floor count as much as the query does
  int64_t bytes;

  __host__ __device__ explicit ReceivedShared(unsigned char* memory) {
    Shared pieces(memory);
    keys = pieces.take<T>(C::kBlockRows * C::kStride);
    queries = pieces.take<T>(2 * C::kBuffer);
    base = pieces.take<W>(2 * C::kQueries);
    share = pieces.take<W>(2 * C::kQueries);
    floor = pieces.take<W>(C::kMasked ? 2 * C::kQueries : 0);
    bytes = pieces.bytes();
  }
};

// What a lane holds of its rows: read at the start, and summed up over the queries so far.
template <class C>
struct ReceivedRows {
  using W = typename C::W;
  W scale, bias[C::kRows][2], own_inverse[C::kRows][2] = {};  // own: of the query that is the same token
  W sum[C::kRows][2] = {}, floor_sum = 0;
};

template <class C>
struct ReceivedPass {
  using T = typename C::T;
  using W = typename C::W;
  using Keys = Left<T, C::kRows, C::kDepth>;

  const AttentionArgs& a;
  const AttentionRows<W>& rows;
  const bool aligned;
  ReceivedShared<C> shared;
  HeadRows<C::kWarpRows, C::kBlockRows> at;  // rows are keys
  const int tid, tokens, head_dim;
  const T* q;  // token 0 of the head

  __device__ __forceinline__ ReceivedPass(const AttentionArgs& args, const AttentionRows<W>& scratch, bool is_aligned)
      : a(args),
        rows(scratch),
        aligned(is_aligned),
        shared(shared_memory()),
        at(args),
        tid(static_cast<int>(threadIdx.x)),
        tokens(static_cast<int>(args.tokens)),
        head_dim(static_cast<int>(args.head_dim)),
        q(head_of<T>(args.q, at.image, at.head)) {}

  __device__ bool active() const { return at.warp_row < tokens; }

  // --- fetch

  __device__ __forceinline__ void fetch_keys() const {
    fetch_rows<T, C::kDepth>(shared.keys, C::kBlockRows, head_of<T>(a.k, at.image, at.head), a.k.stride_token,
                             at.block_row, a.tokens, head_dim, aligned);
  }
  __device__ __forceinline__ void fetch_queries(int first, int buffer) const {
    fetch_rows<T, C::kDepth>(shared.queries + buffer * C::kBuffer, C::kQueries, q, a.q.stride_token, first, a.tokens,
                             head_dim, aligned);
    copy_commit();
  }

  // The query of this thread in a tile: read long before it is used. One past the end gives nothing.
  struct Query {
    W base, share, floor;
  };
  __device__ __forceinline__ Query read_query(int first) const {
    if (tid >= C::kQueries || first + tid >= tokens) return Query{static_cast<W>(INFINITY), 0, 0};
    const int64_t place = at.image_head * a.tokens + first + tid;
    if constexpr (C::kMasked) {
      const W counts = number_of<W>(a.mask, at.image, first + tid);
      return Query{rows.base[place], rows.inverse[place] * counts, rows.floor[place] * counts};
    } else {
      return Query{rows.base[place], rows.inverse[place], 0};
    }
  }
  __device__ __forceinline__ void put_query(const Query& query, int buffer) const {
    if (tid >= C::kQueries) return;
    shared.base[buffer * C::kQueries + tid] = query.base;
    shared.share[buffer * C::kQueries + tid] = query.share;
    if constexpr (C::kMasked) shared.floor[buffer * C::kQueries + tid] = query.floor;
  }

  __device__ __forceinline__ void read_own_rows(ReceivedRows<C>& own) const {
    own.scale = static_cast<W>(a.scale * kLog2OfE);
    for_rows<C::kRows>([&](int r, int h) {
      const int row = at.token(r, h);
      own.bias[r][h] = bias_of_key<W>(a.size, at.image, row, a.tokens);
      if (C::kMasked && row < tokens) own.own_inverse[r][h] = rows.inverse[at.image_head * a.tokens + row];
    });
  }

  // --- one tile: the queries from token `first`, at rows `row` .. of the buffers

  __device__ __forceinline__ void receive(const Keys& keys, int first, int row, ReceivedRows<C>& own) const {
    const int own_query = at.token(0, 0) - first;  // the lane's first row, if it is in the tile
    W logits[C::kRows][C::kTiles][4] = {};
    multiply_rows<T, C::kRows, C::kDepth, C::kTiles>(logits, keys, shared.queries + row * C::kStride);
    W tile_sum[C::kRows][2] = {}, tile_floor = 0;  // summed by themselves first: short sums round less
    for_columns<C::kTiles>([&](int n, int i) {
      const int query = n * 8 + column_in_tile(i);
      const W base = shared.base[row + query], share = shared.share[row + query];
      if constexpr (C::kMasked) tile_floor += shared.floor[row + query];
      for_rows<C::kRows>([&](int r, int h) {
        W exponent = logits[r][n][2 * h + i] * own.scale + own.bias[r][h] - base;
        if constexpr (C::kMasked) {
          // a key that the query does not see may have any logit
          exponent = exponent > kSlack ? W(kSlack) : exponent;
          const W own_share = own.own_inverse[r][h];  // read in any case: a branch would cost more
          tile_sum[r][h] += power_of_two(exponent) * (query == own_query + r * 16 + h * 8 ? own_share : share);
        } else {
          tile_sum[r][h] += power_of_two(exponent) * share;
        }
      });
    });
    own.floor_sum += tile_floor;
    for_rows<C::kRows>([&](int r, int h) { own.sum[r][h] += tile_sum[r][h]; });
  }

  // --- after the last tile

  __device__ __forceinline__ void write_sums(ReceivedRows<C>& own) const {
    if constexpr (C::kMasked) own.floor_sum = row_sum(own.floor_sum);
    for_rows<C::kRows>([&](int r, int h) {
      const int row = at.token(r, h);
      const W total = row_sum(own.sum[r][h]);
      if (lane_id() % 4 != 0 || row >= tokens) return;
      rows.importance[at.image_head * a.tokens + row] =
          C::kMasked ? total * number_of<W>(a.mask, at.image, row) + own.floor_sum : total;
    });
  }
};

template <class T, int kDepth, bool kMasked>
__global__ void __launch_bounds__(kAttentionThreads)
    received_kernel(AttentionArgs a, AttentionRows<Wide<T>> rows, bool aligned) {
  using C = ReceivedConfig<T, kDepth, kMasked>;
  ReceivedPass<C> pass(a, rows, aligned);
  pass.fetch_keys();
  pass.fetch_queries(0, 0);
  pass.put_query(pass.read_query(0), 0);
  copy_wait<0>();
  __syncthreads();
  const typename ReceivedPass<C>::Keys keys(pass.shared.keys + warp_id() * C::kWarpRows * C::kStride);
  ReceivedRows<C> own;
  pass.read_own_rows(own);

  int buffer = 0;
  for (int first = 0; first < pass.tokens; first += C::kQueries, buffer ^= 1) {
    if (first > 0) {
      copy_wait<0>();
      __syncthreads();
    }
    const bool more = first + C::kQueries < pass.tokens;
    typename ReceivedPass<C>::Query next{};
    if (more) {
      pass.fetch_queries(first + C::kQueries, buffer ^ 1);
      next = pass.read_query(first + C::kQueries);
    }
    if (pass.active())
      for (int part = 0; part < C::kQueries && first + part < pass.tokens; part += C::kTiles * 8)
        pass.receive(keys, first + part, buffer * C::kQueries + part, own);
    if (more) pass.put_query(next, buffer ^ 1);
  }
  if (pass.active()) pass.write_sums(own);
}

template <bool kMasked>
const char* launch_received(const AttentionArgs& a, void* scratch, Stream stream) {
  return dispatch_heads(a.type, a.head_dim, [&](auto example, auto depth) {
    using T = decltype(example);
    using C = ReceivedConfig<T, decltype(depth)::value, kMasked>;
    bool aligned = aligned_heads<T>(a.q, a.head_dim) && aligned_heads<T>(a.k, a.head_dim);
    return launch(received_kernel<T, C::kDepth, kMasked>, HeadRows<C::kWarpRows, C::kBlockRows>::blocks(a),
                  kAttentionThreads, ReceivedShared<C>(nullptr).bytes, stream, a,
                  AttentionRows<Wide<T>>(a, kMasked, scratch), aligned);
  });
}

}  // namespace diffrate::cuda
