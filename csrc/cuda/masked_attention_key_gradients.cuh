// Kernel 2 of masked_attention's gradients: rows are keys, and queries with their statistics stream by.
#pragma once

#include "cuda/masked_attention_backward.cuh"

namespace diffrate::cuda {

template <class W>
struct alignas(4 * sizeof(W)) QueryFacts {
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
struct KeyPass {
  using W = Wide<T>;
  using S = typename Shapes<T, kDepth>::Keys;
  using Rows = HeadRows<S::kWarpRows, S::kBlockRows>;
  using Memory = BackwardShared<T, kDepth, S, QueryFacts<W>>;
  using Own = Left<T, S::kRows, kDepth>;
  using Columns = W[S::kRows][S::kTiles][4];  // numbers of the warp's rows and the columns it works on
  using OfRows = W[S::kRows][2];
  using Gradient = W[S::kRows][kDepth / 8][4];

  const AttentionArgs& a;
  const Rows at;
  const Memory memory;
  const Operands<T> keys, queries;
  const int tokens;
  const W scale, floor;
  W attention_unit = 1, unit = 1;  // what attention and gradients of logits are multiplied with

  __device__ __forceinline__ KeyPass(const AttentionArgs& args, const Aligned& aligned)
      : a(args),
        at(args),
        memory(shared_memory()),
        keys(args.k, aligned.k, args.v, aligned.v, at.image, at.head),
        queries(args.q, aligned.q, args.grad, aligned.grad, at.image, at.head),
        tokens(static_cast<int>(args.tokens)),
        scale(static_cast<W>(args.scale * kLog2OfE)),
        floor(static_cast<W>(kMaskedEpsilon / args.tokens)) {}

  // --- fetch

  __device__ __forceinline__ void fetch_own() const {
    keys.template fetch<kDepth, S::kBlockRows, S::kThreads>(memory.own_first, memory.own_second, at.block_row, a);
    copy_commit();
  }
  __device__ __forceinline__ void choose_units(const Statistics<W>& statistics, int64_t head_start) {
    if constexpr (kTensorCores<T>) {
      attention_unit = kMostAttention;
      unit = gradient_unit<T>(largest_of<S::kWarps>(statistics.largest + head_start, a.tokens, memory.partial));
    }
  }
  __device__ __forceinline__ void fetch_queries(int tile, const Statistics<W>& statistics, int64_t head_start) const {
    memory.fetch(tile, queries, tile * S::kTile, a, [&](int64_t token) {
      if (token >= a.tokens) return QueryFacts<W>{FLT_MAX, 0, 0, 0};  // whatever the logit: its exponential is 0
      W inverse = statistics.inverse[head_start + token];
      return QueryFacts<W>{statistics.top[head_start + token], inverse * attention_unit, inverse * unit,
                           statistics.delta[head_start + token] * (inverse * unit)};
    });
  }

  // --- one tile

  // What a lane holds of its rows: read at the start, and summed up.
  struct State {
    OfRows bias, mask, returning, grad_mask = {};
    Gradient grad_k = {}, grad_v = {};
  };
  __device__ __forceinline__ void read_own(State& rows) const {
    for_rows<S::kRows>([&](int r, int h) {
      rows.bias[r][h] = bias_of_key<W>(a.size, at.image, at.token(r, h), a.tokens);
      rows.mask[r][h] = mask_of_key<W>(a.mask, at.image, at.token(r, h), a.tokens);
      // a masked key that came back would add to Z, too
      rows.returning[r][h] = a.difference ? (1 - rows.mask[r][h]) / attention_unit : W(0);
    });
  }

  // Turns logits into attention, and dA into the gradient of the logits, and adds to that of the mask. The columns are
  // the queries from token `first` on.
  __device__ __forceinline__ void differentiate(State& rows, Columns& logits, Columns& change, int first,
                                                const QueryFacts<W>* facts) const {
    int own[S::kRows][2];
    for_rows<S::kRows>([&](int r, int h) { own[r][h] = own_column(at, r, h, first); });
    for_fragment<S::kRows, S::kTiles>([&](int r, int n, int i) {
      QueryFacts<W> query = facts[n * 8 + i % 2];
      W e = power_of_two(logits[r][n][i] * scale + rows.bias[r][i / 2] - query.top);
      W x = change[r][n][i] * query.gradient - query.delta;
      bool itself = n * 8 + i % 2 == own[r][i / 2];
      W seen = itself ? e : e * rows.mask[r][i / 2];
      // what a token sees of itself is no matter of its mask
      if (!itself) rows.grad_mask[r][i / 2] += e * x / (1 + e * query.attention * rows.returning[r][i / 2]);
      change[r][n][i] = seen * x;
      logits[r][n][i] = seen * query.attention + floor * query.attention;
    });
  }

  __device__ __forceinline__ void add_tile(State& rows, const Own& own_k, const Own& own_v, int tile) const {
#pragma unroll 1
    for (int c = 0; c < S::kTile && tile * S::kTile + c < tokens; c += S::kColumns) {
      const T* query_rows = memory.first_of(tile) + c * Memory::kStride;
      const T* grad_rows = memory.second_of(tile) + c * Memory::kStride;
      Columns logits, change;
      products<T, S, kDepth>(logits, own_k, query_rows);
      products<T, S, kDepth>(change, own_v, grad_rows);
      differentiate(rows, logits, change, tile * S::kTile + c, memory.facts_of(tile) + c + lane_id() % 4 * 2);
      multiply_columns<T, S::kRows, S::kTiles, kDepth>(
          rows.grad_v, Weights<T, S::kRows, S::kTiles>(logits, memory.own_weights()), grad_rows);
      multiply_columns<T, S::kRows, S::kTiles, kDepth>(
          rows.grad_k, Weights<T, S::kRows, S::kTiles>(change, memory.own_weights()), query_rows);
    }
  }

  // --- after the last tile

  __device__ __forceinline__ void write(State& rows, const Statistics<W>& statistics, int64_t head_start,
                                        const Aligned& aligned) const {
    OfRows factor_k, factor_v;
    for_rows<S::kRows>([&](int r, int h) {
      factor_k[r][h] = static_cast<W>(a.scale) / unit;
      factor_v[r][h] = 1 / attention_unit;
      W total = row_sum(rows.grad_mask[r][h]) / unit;
      if (lane_id() % 4 == 0 && at.token(r, h) < a.tokens) statistics.grad_mask[head_start + at.token(r, h)] = total;
    });
    scale_rows<T, S, kDepth>(rows.grad_k, factor_k);
    scale_rows<T, S, kDepth>(rows.grad_v, factor_v);
    T* stage = memory.own_first + Memory::own_offset();
    write_gradient<T, S, kDepth>(a.grad_k, rows.grad_k, at, a, aligned.out, stage);
    write_gradient<T, S, kDepth>(a.grad_v, rows.grad_v, at, a, aligned.out, stage);
  }
};

template <class T, int kDepth>
__global__ void __launch_bounds__(Shapes<T, kDepth>::Keys::kThreads, Shapes<T, kDepth>::Keys::kBlocks)
    key_gradients(AttentionArgs a, Aligned aligned, void* scratch) {
  using Pass = KeyPass<T, kDepth>;
  using S = typename Pass::S;
  Pass pass(a, aligned);
  pass.fetch_own();
  const Statistics<Wide<T>> statistics(scratch, a.images * a.heads * a.tokens);
  const int64_t head_start = pass.at.image_head * a.tokens;
  pass.choose_units(statistics, head_start);
  pass.fetch_queries(0, statistics, head_start);
  copy_wait<0>();
  __syncthreads();
  const typename Pass::Own own_k(pass.memory.own_first + Pass::Memory::own_offset());
  const typename Pass::Own own_v(pass.memory.own_second + Pass::Memory::own_offset());
  typename Pass::State rows;
  pass.read_own(rows);

  const int tiles = (pass.tokens + S::kTile - 1) / S::kTile;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before any more
    if (tile + 1 < tiles) pass.fetch_queries(tile + 1, statistics, head_start);
    if (pass.at.warp_row < pass.tokens) pass.add_tile(rows, own_k, own_v, tile);
  }
  pass.write(rows, statistics, head_start, aligned);
}

}  // namespace diffrate::cuda
