// The sums of the attention map's columns, without the map: logits are computed once more, now with the keys as the
// rows of a warp and queries streaming by.
#pragma once

#include "cuda/attention_forward.cuh"

namespace diffrate::cuda {

template <class T, int kDepth, bool kMasked>
struct ReceivedShared {
  using W = Wide<T>;
  static constexpr int kQueries = kKeyTile<T, kDepth>;
  static constexpr int kTile = kQueries * stride_of<T, kDepth>;

  T* keys;                  // (kBlockRows, stride)
  T* queries;               // two tiles
  W *base, *share, *floor;  // (2, kQueries): share and floor count as much as the query does
  int64_t bytes;

  __host__ __device__ explicit ReceivedShared(unsigned char* memory) {
    Shared pieces(memory);
    keys = pieces.take<T>(kBlockRows<T, kDepth> * stride_of<T, kDepth>);
    queries = pieces.take<T>(2 * kTile);
    base = pieces.take<W>(2 * kQueries);
    share = pieces.take<W>(2 * kQueries);
    floor = pieces.take<W>(kMasked ? 2 * kQueries : 0);
    bytes = pieces.bytes();
  }
};

template <class T, int kDepth, bool kMasked>
__global__ void __launch_bounds__(kAttentionThreads)
    received_kernel(MaskedAttentionArgs a, AttentionRows<Wide<T>> rows, bool aligned) {
  using W = Wide<T>;
  using Memory = ReceivedShared<T, kDepth, kMasked>;
  constexpr int kRows = kRowTiles<T, kDepth>, kQueries = Memory::kQueries, kTiles = kKeysAtOnce<T, kDepth> / 8;
  constexpr W kInfinity = static_cast<W>(INFINITY);
  Memory shared(shared_memory());
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t blocks_of_head = (a.tokens + kBlockRows<T, kDepth> - 1) / kBlockRows<T, kDepth>;
  const int64_t image_head = blockIdx.x / blocks_of_head, image = image_head / a.heads, head = image_head % a.heads;
  const int tokens = static_cast<int>(a.tokens), head_dim = static_cast<int>(a.head_dim);
  const int block_row = static_cast<int>(blockIdx.x % blocks_of_head) * kBlockRows<T, kDepth>;
  const int first_row = block_row + warp_id() * 16 * kRows;  // of this warp: a key
  const bool active = first_row < tokens;
  const T* q = head_of<T>(a.q, image, head);

  auto fetch_tile = [&](int first, int buffer) {
    fetch_rows<T, kDepth>(shared.queries + buffer * Memory::kTile, kQueries, q, a.q.stride_token, first, a.tokens,
                          head_dim, aligned);
    copy_commit();
  };
  // the query of this thread in a tile: read long before it is used; one past the end gives nothing
  struct Query {
    W base, share, floor;
  };
  auto read_query = [&](int first) {
    if (tid >= kQueries || first + tid >= tokens) return Query{kInfinity, 0, 0};
    const int64_t at = image_head * a.tokens + first + tid;
    if constexpr (kMasked) {
      const W counts = number_of<W>(a.mask, image, first + tid);
      return Query{rows.base[at], rows.inverse[at] * counts, rows.floor[at] * counts};
    } else {
      return Query{rows.base[at], rows.inverse[at], 0};
    }
  };
  auto put_query = [&](const Query& query, int buffer) {
    if (tid >= kQueries) return;
    shared.base[buffer * kQueries + tid] = query.base;
    shared.share[buffer * kQueries + tid] = query.share;
    if constexpr (kMasked) shared.floor[buffer * kQueries + tid] = query.floor;
  };

  fetch_rows<T, kDepth>(shared.keys, kBlockRows<T, kDepth>, head_of<T>(a.k, image, head), a.k.stride_token, block_row,
                        a.tokens, head_dim, aligned);
  fetch_tile(0, 0);
  put_query(read_query(0), 0);
  copy_wait<0>();
  __syncthreads();

  const Left<T, kRows, kDepth> left(shared.keys + warp_id() * 16 * kRows * stride_of<T, kDepth>);
  const W scale = static_cast<W>(a.scale * kLog2OfE);
  W bias[kRows][2], own_inverse[kRows][2] = {}, sum[kRows][2] = {}, floor_sum = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + r * 16 + h * 8 + lane_id() / 4;
      bias[r][h] = bias_of_key<W>(a.size, image, row, a.tokens);
      if (kMasked && row < tokens) own_inverse[r][h] = rows.inverse[image_head * a.tokens + row];
    }

  // queries from token `first`, at rows `at` .. of the buffers
  auto use_queries = [&](int first, int at) {
    const bool diagonal = kMasked && first < first_row + 16 * kRows && first_row < first + kTiles * 8;
    const int own_query = first_row - first + lane_id() / 4;  // of the lane's first row, in the tile
    W logits[kRows][kTiles][4] = {};
    multiply_rows<T, kRows, kDepth, kTiles>(logits, left, shared.queries + at * stride_of<T, kDepth>);
    W tile_sum[kRows][2] = {}, tile_floor = 0;  // summed by themselves first: short sums round less
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = n * 8 + column_in_tile(i);
        const W base = shared.base[at + query], share = shared.share[at + query];
        if constexpr (kMasked) tile_floor += shared.floor[at + query];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            W exponent = logits[r][n][2 * h + i] * scale + bias[r][h] - base;
            if constexpr (kMasked) {
              // a key that the query does not see may have any logit
              exponent = exponent > kSlack ? W(kSlack) : exponent;
              const bool own = diagonal && query == own_query + r * 16 + h * 8;
              tile_sum[r][h] += power_of_two(exponent) * (own ? own_inverse[r][h] : share);
            } else {
              tile_sum[r][h] += power_of_two(exponent) * share;
            }
          }
      }
    floor_sum += tile_floor;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[r][h] += tile_sum[r][h];
  };

  int buffer = 0;
  for (int first = 0; first < tokens; first += kQueries, buffer ^= 1) {
    if (first > 0) {
      copy_wait<0>();
      __syncthreads();
    }
    const bool more = first + kQueries < tokens;
    Query next{};
    if (more) {
      fetch_tile(first + kQueries, buffer ^ 1);
      next = read_query(first + kQueries);
    }
    if (active)
      for (int part = 0; part < kQueries && first + part < tokens; part += kTiles * 8)
        use_queries(first + part, buffer * kQueries + part);
    if (more) put_query(next, buffer ^ 1);
  }
  if (!active) return;

  if constexpr (kMasked) floor_sum = row_sum(floor_sum);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + r * 16 + h * 8 + lane_id() / 4;
      const W total = row_sum(sum[r][h]);
      if (lane_id() % 4 != 0 || row >= tokens) continue;
      rows.importance[image_head * a.tokens + row] =
          kMasked ? total * number_of<W>(a.mask, image, row) + floor_sum : total;
    }
}

template <bool kMasked>
const char* launch_received(const MaskedAttentionArgs& a, void* scratch, Stream stream) {
  return dispatch_heads(a.type, a.head_dim, [&](auto example, auto depth) {
    using T = decltype(example);
    constexpr int kDepth = depth;
    bool aligned = aligned_heads<T>(a.q, a.head_dim) && aligned_heads<T>(a.k, a.head_dim);
    int64_t blocks = a.images * a.heads * ((a.tokens + kBlockRows<T, kDepth> - 1) / kBlockRows<T, kDepth>);
    return launch(received_kernel<T, kDepth, kMasked>, blocks, kAttentionThreads,
                  ReceivedShared<T, kDepth, kMasked>(nullptr).bytes, stream, a,
                  AttentionRows<Wide<T>>(a, kMasked, scratch), aligned);
  });
}

}  // namespace diffrate::cuda
