// Kernel 1 of masked_attention's gradients: rows are queries, and keys stream by twice.
#pragma once

#include "cuda/masked_attention_backward.cuh"

namespace diffrate::cuda {

template <class W>
struct KeyFacts {
  W bias, mask;
};

template <class T, int kDepth>
struct QueryPass {
  using W = Wide<T>;
  using S = typename Shapes<T, kDepth>::Queries;
  using Rows = HeadRows<S::kWarpRows, S::kBlockRows>;
  using Memory = BackwardShared<T, kDepth, S, KeyFacts<W>>;
  using Own = Left<T, S::kRows, kDepth>;
  using Columns = W[S::kRows][S::kTiles][4];  // numbers of the warp's rows and the columns it works on
  using OfRows = W[S::kRows][2];
  using Gradient = W[S::kRows][kDepth / 8][4];

  const AttentionArgs& a;
  const Rows at;
  const Memory memory;
  const Operands<T> queries, keys;
  const int tokens, tiles;  // tiles of keys
  const W scale, floor;

  __device__ __forceinline__ QueryPass(const AttentionArgs& args, const Aligned& aligned)
      : a(args),
        at(args),
        memory(shared_memory()),
        queries(args.q, aligned.q, args.grad, aligned.grad, at.image, at.head),
        keys(args.k, aligned.k, args.v, aligned.v, at.image, at.head),
        tokens(static_cast<int>(args.tokens)),
        tiles((tokens + S::kTile - 1) / S::kTile),
        scale(static_cast<W>(args.scale * kLog2OfE)),
        floor(static_cast<W>(kMaskedEpsilon / args.tokens)) {}

  // --- fetch

  __device__ __forceinline__ void fetch_own() const {
    queries.template fetch<kDepth, S::kBlockRows, S::kThreads>(memory.own_first, memory.own_second, at.block_row, a);
  }
  __device__ __forceinline__ void fetch_keys(int step) const {
    memory.fetch(step, keys, step % tiles * S::kTile, a, [&](int64_t token) {
      return KeyFacts<W>{bias_of_key<W>(a.size, at.image, token, a.tokens),
                         mask_of_key<W>(a.mask, at.image, token, a.tokens)};
    });
  }

  // Calls body(logits, dA, visible, the columns' rows of k) for all keys, some columns at a time, where visible(r, n,
  // i) is what a row sees of a key. The steps of the first pass over the keys are 0 .. tiles-1, those of the second
  // follow.
  template <class Body>
  __device__ __forceinline__ void over_keys(int& step, const Own& own_q, const Own& own_grad, Body body) const {
    Columns logits, change;
    for (int tile = 0; tile < tiles; ++tile, ++step) {
      copy_wait<0>();
      __syncthreads();  // this tile is there, and nobody reads the one before any more
      if (step + 1 < 2 * tiles) fetch_keys(step + 1);
      if (at.warp_row >= tokens) continue;
#pragma unroll 1
      for (int c = 0; c < S::kTile && tile * S::kTile + c < tokens; c += S::kColumns) {
        const T* columns = memory.first_of(step) + c * Memory::kStride;
        products<T, S, kDepth>(logits, own_q, columns);
        products<T, S, kDepth>(change, own_grad, memory.second_of(step) + c * Memory::kStride);
        const KeyFacts<W>* facts = memory.facts_of(step) + c + lane_id() % 4 * 2;
        int own[S::kRows][2];
        for_rows<S::kRows>([&](int r, int h) { own[r][h] = own_column(at, r, h, tile * S::kTile + c); });
        for_fragment<S::kRows, S::kTiles>(
            [&](int r, int n, int i) { logits[r][n][i] = logits[r][n][i] * scale + facts[n * 8 + i % 2].bias; });
        auto visible = [&](int r, int n, int i) {
          return n * 8 + i % 2 == own[r][i / 2] ? W(1) : facts[n * 8 + i % 2].mask;
        };
        body(logits, change, visible, columns);
      }
    }
  }

  // --- first pass: statistics. Each lane has its own largest logit and sums, over its own columns, until the end.

  struct Sums {
    OfRows top, seen = {}, product = {}, sum = {}, largest = {};
    __device__ __forceinline__ Sums() {
      // not infinity: a lane may have seen no key but those past the last
      for_rows<S::kRows>([&](int r, int h) { top[r][h] = -FLT_MAX; });
    }
  };

  template <class Visible>
  __device__ __forceinline__ static void add(Sums& sums, const Columns& logits, const Columns& change,
                                             Visible visible) {
    OfRows before;
    for_rows<S::kRows>([&](int r, int h) { before[r][h] = sums.top[r][h]; });
    for_fragment<S::kRows, S::kTiles>(
        [&](int r, int n, int i) { sums.top[r][i / 2] = greater(logits[r][n][i], sums.top[r][i / 2]); });
    for_rows<S::kRows>([&](int r, int h) {
      W factor = power_of_two(before[r][h] - sums.top[r][h]);
      sums.seen[r][h] *= factor;
      sums.product[r][h] *= factor;
    });
    for_fragment<S::kRows, S::kTiles>([&](int r, int n, int i) {
      W weight = power_of_two(logits[r][n][i] - sums.top[r][i / 2]) * visible(r, n, i), x = change[r][n][i];
      sums.seen[r][i / 2] += weight;
      sums.product[r][i / 2] += weight * x;
      sums.sum[r][i / 2] += x;
      if constexpr (kTensorCores<T>) sums.largest[r][i / 2] = greater(fabsf(x), sums.largest[r][i / 2]);
    });
  }

  // What the second pass needs of each row: gradients of logits are weight * (dA * unit - delta_unit), and `factor`
  // brings those of q back to their own magnitude.
  struct RowFacts {
    OfRows top, unit, delta_unit, factor;
  };

  // Adds up the lanes' sums, and writes down what kernel 2 needs of them.
  __device__ __forceinline__ RowFacts finish(const Sums& sums, const Statistics<W>& statistics) const {
    RowFacts facts;
    for_rows<S::kRows>([&](int r, int h) {
      W highest = row_max(sums.top[r][h]), adjust = power_of_two(sums.top[r][h] - highest);
      W inverse = 1 / (row_sum(sums.seen[r][h] * adjust) + W(kMaskedEpsilon));
      W delta = (row_sum(sums.product[r][h] * adjust) + floor * row_sum(sums.sum[r][h])) * inverse;
      W most = row_max(sums.largest[r][h]);
      facts.top[r][h] = highest;
      facts.unit[r][h] = inverse * gradient_unit<T>(most);
      facts.delta_unit[r][h] = delta * facts.unit[r][h];
      facts.factor[r][h] = static_cast<W>(a.scale) / gradient_unit<T>(most);
      int token = at.token(r, h);
      if (lane_id() % 4 != 0 || token >= tokens) return;
      int64_t place = at.image_head * a.tokens + token;
      statistics.top[place] = highest;
      statistics.inverse[place] = inverse;
      statistics.delta[place] = delta;
      if constexpr (kTensorCores<T>) statistics.largest[place] = most;
    });
    return facts;
  }

  // --- second pass

  template <class Visible>
  __device__ __forceinline__ void add(Gradient& grad_q, const RowFacts& rows, Columns& logits, const Columns& change,
                                      Visible visible, const T* columns) const {
    for_fragment<S::kRows, S::kTiles>([&](int r, int n, int i) {
      W weight = power_of_two(logits[r][n][i] - rows.top[r][i / 2]) * visible(r, n, i);
      logits[r][n][i] = weight * (change[r][n][i] * rows.unit[r][i / 2] - rows.delta_unit[r][i / 2]);
    });
    Weights<T, S::kRows, S::kTiles> weights(logits, memory.own_weights());
    multiply_columns<T, S::kRows, S::kTiles, kDepth>(grad_q, weights, columns);
  }
};

template <class T, int kDepth>
__global__ void __launch_bounds__(Shapes<T, kDepth>::Queries::kThreads, Shapes<T, kDepth>::Queries::kBlocks)
    query_gradients(AttentionArgs a, Aligned aligned, void* scratch) {
  using Pass = QueryPass<T, kDepth>;
  using Columns = typename Pass::Columns;
  const Pass pass(a, aligned);
  pass.fetch_own();
  pass.fetch_keys(0);
  copy_wait<0>();
  __syncthreads();
  const typename Pass::Own own_q(pass.memory.own_first + Pass::Memory::own_offset());
  const typename Pass::Own own_grad(pass.memory.own_second + Pass::Memory::own_offset());
  int step = 0;

  typename Pass::Sums sums;
  pass.over_keys(step, own_q, own_grad, [&](const Columns& logits, const Columns& change, auto visible, const T*) {
    pass.add(sums, logits, change, visible);
  });
  const auto rows = pass.finish(sums, Statistics<Wide<T>>(scratch, a.images * a.heads * a.tokens));

  typename Pass::Gradient grad_q = {};
  pass.over_keys(step, own_q, own_grad, [&](Columns& logits, const Columns& change, auto visible, const T* columns) {
    pass.add(grad_q, rows, logits, change, visible, columns);
  });
  scale_rows<T, typename Pass::S, kDepth>(grad_q, rows.factor);
  write_gradient<T, typename Pass::S, kDepth>(a.grad_q, grad_q, pass.at, a, aligned.out,
                                              pass.memory.own_first + Pass::Memory::own_offset());
}

}  // namespace diffrate::cuda
