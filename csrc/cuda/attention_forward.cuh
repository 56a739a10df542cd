// Attention in one pass over the keys, with the softmax brought up to date from tile to tile: no map exists.
//
// A block has kBlockRows queries of one head; keys and values stream through two buffers in shared memory, one filling
// while the other is used. A block of warps has finished with a buffer when all are past the barrier of the next tile.
// For each tile a warp takes these steps: score, hide_masked, write_class_logits, rescale, weigh, accumulate.
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/head_mean.cuh"

namespace diffrate::cuda {

// How far a logit may exceed the base that is taken off before the base moves, which costs a pass over the results.
// Powers of two up to 2^8 are no loss in any number format here.
constexpr int kSlack = 8;

template <class T_, int kDepth_, bool kMasked_, bool kValues_>
struct ForwardConfig {
  using T = T_;
  using W = Wide<T>;
  static constexpr int kDepth = kDepth_;
  static constexpr bool kMasked = kMasked_, kValues = kValues_;

  static constexpr int kRows = kRowTiles<T, kDepth>;  // tiles of 16 queries that a warp works on
  static constexpr int kWarpRows = 16 * kRows, kBlockRows = kAttentionWarps * kWarpRows;
  static constexpr int kKeys = kKeyTile<T, kDepth>;          // in a buffer
  static constexpr int kTiles = kKeysAtOnce<T, kDepth> / 8;  // tiles of 8 keys that a warp works on at once
  static constexpr int kStride = stride_of<T, kDepth>;
  static constexpr int kBuffer = kKeys * kStride;  // numbers
  static constexpr int kWeights = weights_buffer<T, kRows, kTiles>;

  using Logits = W[kRows][kTiles][4];
  using OfRows = W[kRows][2];
};

template <class C>
struct ForwardShared {
  using T = typename C::T;
  using W = typename C::W;

  T* queries;        // (kBlockRows, stride); at the end the results
  T *keys, *values;  // two buffers each
  W *bias, *mask;    // (2, kKeys)
  T* weights;        // of each warp
  W* value_sums;     // (kAttentionThreads)
  int64_t bytes;

  __host__ __device__ explicit ForwardShared(unsigned char* memory) {
    Shared pieces(memory);
    queries = pieces.take<T>(C::kBlockRows * C::kStride);
    keys = pieces.take<T>(2 * C::kBuffer);
    values = pieces.take<T>(C::kValues ? 2 * C::kBuffer : 0);
    bias = pieces.take<W>(2 * C::kKeys);
    mask = pieces.take<W>(C::kMasked ? 2 * C::kKeys : 0);
    weights = pieces.take<T>(C::kValues ? kAttentionWarps * C::kWeights : 0);
    value_sums = pieces.take<W>(C::kMasked && C::kValues ? kAttentionThreads : 0);
    bytes = pieces.bytes();
  }
};

// What a lane holds of its rows after the keys so far.
template <class C>
struct ForwardRows {
  using W = typename C::W;
  W out[C::kRows][C::kDepth / 8][4] = {};  // not used without values
  typename C::OfRows base, top;            // base is taken off the logits; top is the largest of this lane's keys
  typename C::OfRows sum = {};             // of this lane's exponentials
  W value_sum = 0;                         // of column threadIdx.x % kDepth

  __device__ __forceinline__ ForwardRows() {
    for_rows<C::kRows>([&](int r, int h) { base[r][h] = top[r][h] = -static_cast<W>(INFINITY); });
  }
};

template <class C>
struct ForwardPass {
  using T = typename C::T;
  using W = typename C::W;
  using Queries = Left<T, C::kRows, C::kDepth>;
  static constexpr W kInfinity = static_cast<W>(INFINITY);

  const AttentionArgs& a;
  const AttentionRows<W>& to;
  const bool aligned;
  ForwardShared<C> shared;
  HeadRows<C::kWarpRows, C::kBlockRows> at;
  const int tid, tokens, head_dim;
  const T *k, *v;  // token 0 of the head
  const W scale;
  W* class_row;  // of the head, in scratch memory
  const bool has_class_row;

  __device__ __forceinline__ ForwardPass(const AttentionArgs& args, const AttentionRows<W>& scratch, bool is_aligned)
      : a(args),
        to(scratch),
        aligned(is_aligned),
        shared(shared_memory()),
        at(args),
        tid(static_cast<int>(threadIdx.x)),
        tokens(static_cast<int>(args.tokens)),
        head_dim(static_cast<int>(args.head_dim)),
        k(head_of<T>(args.k, at.image, at.head)),
        v(C::kValues ? head_of<T>(args.v, at.image, at.head) : nullptr),
        scale(static_cast<W>(args.scale * kLog2OfE)),
        class_row(scratch.importance + at.image_head * args.tokens),
        has_class_row(at.warp_row == 0 && args.importance != nullptr && !args.received) {}

  __device__ bool active() const { return at.warp_row < tokens; }
  __device__ T* own_rows() const { return shared.queries + warp_id() * C::kWarpRows * C::kStride; }

  // --- fetch

  __device__ __forceinline__ void fetch_queries() const {
    fetch_rows<T, C::kDepth>(shared.queries, C::kBlockRows, head_of<T>(a.q, at.image, at.head), a.q.stride_token,
                             at.block_row, a.tokens, head_dim, aligned);
  }

  __device__ __forceinline__ void fetch_keys(int first, int buffer) const {
    fetch_rows<T, C::kDepth>(shared.keys + buffer * C::kBuffer, C::kKeys, k, a.k.stride_token, first, a.tokens,
                             head_dim, aligned);
    if constexpr (C::kValues)
      fetch_rows<T, C::kDepth>(shared.values + buffer * C::kBuffer, C::kKeys, v, a.v.stride_token, first, a.tokens,
                               head_dim, aligned);
    copy_commit();
  }

  // The key of this thread in a tile: read long before it is used.
  struct Key {
    W bias, mask;
  };
  __device__ __forceinline__ Key read_key(int first) const {
    if (tid >= C::kKeys) return Key{};
    return Key{bias_of_key<W>(a.size, at.image, first + tid, a.tokens),
               C::kMasked ? mask_of_key<W>(a.mask, at.image, first + tid, a.tokens) : W(0)};
  }
  __device__ __forceinline__ void put_key(const Key& key, int buffer) const {
    if (tid >= C::kKeys) return;
    shared.bias[buffer * C::kKeys + tid] = key.bias;
    if constexpr (C::kMasked) shared.mask[buffer * C::kKeys + tid] = key.mask;
  }

  // --- one tile: the keys from token `first`, at rows `row` .. of the buffers

  __device__ __forceinline__ void attend(const Queries& queries, int first, int row, ForwardRows<C>& rows) const {
    typename C::Logits e = {};  // logits, then weights
    typename C::OfRows highest;
    score(queries, row, e, highest, rows);
    hide_masked(first, row, e, highest);
    write_class_logits(first, e);
    rescale(highest, rows);
    weigh(first, row, e, rows);
    accumulate(row, e, rows);
  }

  // Logits, and the largest of each row: of all keys for the epsilons (masked), or of those that are seen.
  __device__ __forceinline__ void score(const Queries& queries, int row, typename C::Logits& e,
                                        typename C::OfRows& highest, ForwardRows<C>& rows) const {
    multiply_rows<T, C::kRows, C::kDepth, C::kTiles>(e, queries, shared.keys + row * C::kStride);
    for_rows<C::kRows>([&](int r, int h) { highest[r][h] = -kInfinity; });
    for_columns<C::kTiles>([&](int n, int i) {
      const W bias = shared.bias[row + n * 8 + column_in_tile(i)];
      for_rows<C::kRows>([&](int r, int h) {
        W& logit = e[r][n][2 * h + i];
        logit = logit * scale + bias;
        W& most = C::kMasked ? rows.top[r][h] : highest[r][h];
        most = greater(most, logit);
      });
    });
  }

  // Calls body(what row (r, h) sees of a key, what is in `e` of them, r, h). A token that is masked is seen by itself
  // alone. In two copies, as few tiles have keys that are rows of the warp.
  template <class Body>
  __device__ __forceinline__ void for_masked(int first, int row, typename C::Logits& e, Body body) const {
    const int own_key = at.warp_row - first + lane_id() / 4;  // of the lane's first row
    auto loop = [&](auto with_own_keys) {
      for_columns<C::kTiles>([&](int n, int i) {
        const W mask = shared.mask[row + n * 8 + column_in_tile(i)];
        for_rows<C::kRows>([&](int r, int h) {
          const bool own = with_own_keys && n * 8 + column_in_tile(i) == own_key + r * 16 + h * 8;
          body(own ? W(1) : mask, e[r][n][2 * h + i], r, h);
        });
      });
    };
    if (at.overlaps(first, C::kTiles * 8))
      loop(std::true_type{});
    else
      loop(std::false_type{});
  }

  __device__ __forceinline__ void hide_masked(int first, int row, typename C::Logits& e,
                                              typename C::OfRows& highest) const {
    if constexpr (C::kMasked)
      for_masked(first, row, e, [&](W mask, W& logit, int r, int h) {
        logit += mask == 0 ? -kInfinity : W(0);
        highest[r][h] = greater(highest[r][h], logit);
      });
  }

  __device__ __forceinline__ void write_class_logits(int first, const typename C::Logits& e) const {
    if (!has_class_row || lane_id() >= 4) return;
    for_columns<C::kTiles>([&](int n, int i) {
      const int key = first + n * 8 + column_in_tile(i);
      if (key < tokens) class_row[key] = e[0][n][i];
    });
  }

  // Moves the base where a logit exceeds it by too much, and scales what was summed with the old one.
  __device__ __forceinline__ void rescale(typename C::OfRows& highest, ForwardRows<C>& rows) const {
    bool moves = false;
    for_rows<C::kRows>([&](int r, int h) {
      highest[r][h] = row_max(highest[r][h]);
      moves = moves || highest[r][h] > rows.base[r][h] + kSlack;
    });
    if (__ballot_sync(kAllLanes, moves) == 0) return;
    for_rows<C::kRows>([&](int r, int h) {
      if (!(highest[r][h] > rows.base[r][h])) return;
      const W factor = power_of_two(rows.base[r][h] - highest[r][h]);
      rows.base[r][h] = highest[r][h];
      rows.sum[r][h] *= factor;
      if constexpr (C::kValues) for_columns<C::kDepth / 8>([&](int n, int i) { rows.out[r][n][2 * h + i] *= factor; });
    });
  }

  // From logits to exponentials, times the mask.
  __device__ __forceinline__ void weigh(int first, int row, typename C::Logits& e, const ForwardRows<C>& rows) const {
    for_rows<C::kRows>([&](int r, int h) {
      const W taken_off = rows.base[r][h] == -kInfinity ? W(0) : rows.base[r][h];  // nothing seen yet
      for_columns<C::kTiles>([&](int n, int i) {
        W& number = e[r][n][2 * h + i];
        number = power_of_two(number - taken_off);
      });
    });
    if constexpr (C::kMasked) for_masked(first, row, e, [&](W mask, W& weight, int, int) { weight *= mask; });
  }

  __device__ __forceinline__ void accumulate(int row, const typename C::Logits& e, ForwardRows<C>& rows) const {
    for_rows<C::kRows>([&](int r, int h) {
      W part = 0;  // summed by themselves first: short sums round less
      for_columns<C::kTiles>([&](int n, int i) { part += e[r][n][2 * h + i]; });
      rows.sum[r][h] += part;
    });
    if constexpr (C::kValues) {
      const Weights<T, C::kRows, C::kTiles> weights(e, shared.weights + warp_id() * C::kWeights);
      multiply_columns<T, C::kRows, C::kTiles, C::kDepth>(rows.out, weights, shared.values + row * C::kStride);
    }
  }

  // The sums of the values' columns, of which masked attention gives every query a little; by the whole block.
  __device__ __forceinline__ void sum_values(int buffer, ForwardRows<C>& rows) const {
    if constexpr (C::kMasked && C::kValues) {
      constexpr int kParts = kAttentionThreads / C::kDepth;  // threads that share a column
      const T* column = shared.values + buffer * C::kBuffer + tid % C::kDepth;
      if (tid < kParts * C::kDepth)
        for (int row = tid / C::kDepth; row < C::kKeys; row += kParts)
          rows.value_sum += to_wide(column[row * C::kStride]);
    }
  }
  __device__ __forceinline__ void share_value_sums(const ForwardRows<C>& rows) const {
    if constexpr (C::kMasked && C::kValues) {
      shared.value_sums[tid] = rows.value_sum;
      __syncthreads();
    }
  }

  // --- after the last tile

  __device__ __forceinline__ void normalise(const ForwardRows<C>& rows, typename C::OfRows& inverse,
                                            typename C::OfRows& floor) const {
    for_rows<C::kRows>([&](int r, int h) {
      const W total = row_sum(rows.sum[r][h]);
      if constexpr (C::kMasked) {
        // the epsilons are relative to the largest exponential of all, the sums to the largest that is seen
        const W epsilon = static_cast<W>(kMaskedEpsilon);
        const W factor = power_of_two(rows.base[r][h] - row_max(rows.top[r][h]));
        inverse[r][h] = factor / (total * factor + epsilon);
        floor[r][h] = epsilon / static_cast<W>(a.tokens) / (total * factor + epsilon);
      } else {
        inverse[r][h] = 1 / total;
      }
    });
  }

  __device__ __forceinline__ void write_rows(const ForwardRows<C>& rows, const typename C::OfRows& inverse,
                                             const typename C::OfRows& floor) const {
    if (a.importance == nullptr || !a.received || lane_id() % 4 != 0) return;
    for_rows<C::kRows>([&](int r, int h) {
      const int row = at.token(r, h);
      if (row >= tokens) return;
      const int64_t place = at.image_head * a.tokens + row;
      to.base[place] = rows.base[r][h];
      to.inverse[place] = inverse[r][h];
      if constexpr (C::kMasked) to.floor[place] = floor[r][h];
    });
  }

  // From the class token's logits to its attention.
  __device__ __forceinline__ void write_class_row(const ForwardRows<C>& rows, const typename C::OfRows& inverse,
                                                  const typename C::OfRows& floor) const {
    if (!has_class_row) return;
    const W row_base = __shfl_sync(kAllLanes, rows.base[0][0], 0),
            row_inverse = __shfl_sync(kAllLanes, inverse[0][0], 0), row_floor = __shfl_sync(kAllLanes, floor[0][0], 0);
    __syncwarp();  // other lanes have written the logits
    const int lane = lane_id();
    W* own = class_row + lane;
    for (int j = lane; j < tokens; j += kWarp, own += kWarp) {
      const W seen = C::kMasked && j > 0 ? number_of<W>(a.mask, at.image, j) : W(1);
      *own = power_of_two(*own - row_base) * row_inverse * seen + row_floor;
    }
  }

  __device__ __forceinline__ void write_out(ForwardRows<C>& rows, const typename C::OfRows& inverse,
                                            const typename C::OfRows& floor) const {
    if constexpr (C::kValues) {
      for_columns<C::kDepth / 8>([&](int n, int i) {
        W of_column = 0;
        if constexpr (C::kMasked) {
          const int column = n * 8 + column_in_tile(i);
#pragma unroll
          for (int part = 0; part < kAttentionThreads / C::kDepth; ++part)
            of_column += shared.value_sums[part * C::kDepth + column];
        }
        for_rows<C::kRows>([&](int r, int h) {
          rows.out[r][n][2 * h + i] = rows.out[r][n][2 * h + i] * inverse[r][h] + of_column * floor[r][h];
        });
      });
      store_rows<T, C::kRows, C::kDepth>(head_of<T>(a.out, at.image, at.head, a), a.heads * a.head_dim, at.warp_row,
                                         a.tokens, head_dim, a.head_dim % Chunk<T>::kCount == 0, rows.out, own_rows());
    }
  }
};

template <class T, int kDepth, bool kMasked, bool kValues>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_forward_kernel(AttentionArgs a, AttentionRows<Wide<T>> to, bool aligned) {
  using C = ForwardConfig<T, kDepth, kMasked, kValues>;
  ForwardPass<C> pass(a, to, aligned);
  pass.fetch_queries();
  pass.fetch_keys(0, 0);
  pass.put_key(pass.read_key(0), 0);
  copy_wait<0>();
  __syncthreads();
  const typename ForwardPass<C>::Queries queries(pass.own_rows());

  ForwardRows<C> rows;

  int buffer = 0;
  for (int first = 0; first < pass.tokens; first += C::kKeys, buffer ^= 1) {
    if (first > 0) {
      copy_wait<0>();
      __syncthreads();
    }
    const bool more = first + C::kKeys < pass.tokens;
    typename ForwardPass<C>::Key next{};
    if (more) {
      pass.fetch_keys(first + C::kKeys, buffer ^ 1);
      next = pass.read_key(first + C::kKeys);
    }
    if (pass.active())
      for (int part = 0; part < C::kKeys && first + part < pass.tokens; part += C::kTiles * 8)
        pass.attend(queries, first + part, buffer * C::kKeys + part, rows);
    pass.sum_values(buffer, rows);
    if (more) pass.put_key(next, buffer ^ 1);
  }
  pass.share_value_sums(rows);
  if (!pass.active()) return;

  typename C::OfRows inverse, floor = {};
  pass.normalise(rows, inverse, floor);
  pass.write_rows(rows, inverse, floor);
  pass.write_class_row(rows, inverse, floor);
  pass.write_out(rows, inverse, floor);
}

// Importance, if it is wanted and is a mean: from the rows that the forward pass has left, where they come first.
inline const char* mean_over_heads(const AttentionArgs& a, bool masked, const void* rows, Stream stream) {
  if (a.importance == nullptr || a.by_head) return nullptr;
  return head_mean({.type = a.type,
                    .images = a.images,
                    .heads = a.heads,
                    .tokens = a.tokens,
                    .prefix = a.prefix,
                    .rows = rows,
                    .received = a.received,
                    .mask = masked && a.received ? a.mask : Vector{},
                    .importance = a.importance},
                   stream);
}

// The forward pass, and importance if it is wanted.
template <bool kMasked, bool kValues>
const char* attention_forward(const AttentionArgs& a, const Scratch& scratch, void* on) {
  Stream stream = static_cast<Stream>(on);
  if (a.tokens > INT32_MAX / 2) return "too many tokens";
  void* memory = attention_rows_memory(a, kMasked, scratch);
  const char* error = dispatch_heads(a.type, a.head_dim, [&](auto example, auto depth) {
    using T = decltype(example);
    using C = ForwardConfig<T, decltype(depth)::value, kMasked, kValues>;
    bool aligned = aligned_heads<T>(a.q, a.head_dim) && aligned_heads<T>(a.k, a.head_dim) &&
                   (!kValues || aligned_heads<T>(a.v, a.head_dim));
    return launch(attention_forward_kernel<T, C::kDepth, kMasked, kValues>,
                  HeadRows<C::kWarpRows, C::kBlockRows>::blocks(a), kAttentionThreads, ForwardShared<C>(nullptr).bytes,
                  stream, a, AttentionRows<Wide<T>>(a, kMasked, memory), aligned);
  });
  if (error != nullptr) return error;
  if (a.received && a.importance != nullptr) {
    error = kMasked ? masked_sum_over_queries(a, memory, stream) : sum_over_queries(a, memory, stream);
    if (error != nullptr) return error;
  }
  return mean_over_heads(a, kMasked, memory, stream);
}

}  // namespace diffrate::cuda
