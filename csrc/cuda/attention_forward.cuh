// Attention in one pass over the keys, with the softmax brought up to date from tile to tile: no map exists.
//
// A block has kBlockRows queries of one head; keys and values stream through two buffers in shared memory, one filling
// while the other is used. A block of warps has finished with a buffer when all are past the barrier of the next tile.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/head_mean.cuh"

namespace diffrate::cuda {

// What importance is made of, in scratch memory. Query i's attention to key j is
//   plain:  exp2(logit_ij - base_i) inverse_i
//   masked: exp2(logit_ij - base_i) inverse_i (mask_j, or 1 where i = j) + floor_i
template <class W>
struct AttentionRows {
  W* importance;              // (B, H, N): the class token's attention, or sums over queries
  W *base, *inverse, *floor;  // (B, H, N), for attention received
  int64_t bytes;

  AttentionRows(const MaskedAttentionArgs& a, bool masked, void* scratch) {
    int64_t count = a.importance == nullptr ? 0 : a.images * a.heads * a.tokens;
    importance = static_cast<W*>(scratch);
    base = importance + count;
    inverse = base + (a.received ? count : 0);
    floor = inverse + (a.received ? count : 0);
    bytes = (floor + (a.received && masked ? count : 0) - importance) * static_cast<int64_t>(sizeof(W));
  }
};

inline int64_t attention_rows_bytes(const MaskedAttentionArgs& a, bool masked) {
  return a.type == Type::f64 ? AttentionRows<double>(a, masked, nullptr).bytes
                             : AttentionRows<float>(a, masked, nullptr).bytes;
}

// What attention received adds to the forward pass: the sums over queries, from base, inverse and floor.
const char* received_rows(const MaskedAttentionArgs& a, void* scratch, Stream stream);
const char* masked_received_rows(const MaskedAttentionArgs& a, void* scratch, Stream stream);

template <class T, int kDepth, bool kMasked, bool kValues>
struct ForwardShared {
  using W = Wide<T>;
  static constexpr int kKeys = kKeyTile<T, kDepth>;
  static constexpr int kTile = kKeys * stride_of<T, kDepth>;  // numbers of a buffer
  static constexpr int kWeights = weights_buffer<T, kRowTiles<T, kDepth>, kKeysAtOnce<T, kDepth> / 8>;

  T* queries;        // (kBlockRows, stride); at the end the results
  T *keys, *values;  // two tiles each
  W *bias, *mask;    // (2, kKeys)
  T* weights;        // of each warp
  W* value_sums;     // (kAttentionThreads)
  int64_t bytes;

  __host__ __device__ explicit ForwardShared(unsigned char* memory) {
    Shared pieces(memory);
    queries = pieces.take<T>(kBlockRows<T, kDepth> * stride_of<T, kDepth>);
    keys = pieces.take<T>(2 * kTile);
    values = pieces.take<T>(kValues ? 2 * kTile : 0);
    bias = pieces.take<W>(2 * kKeys);
    mask = pieces.take<W>(kMasked ? 2 * kKeys : 0);
    weights = pieces.take<T>(kValues ? kAttentionWarps * kWeights : 0);
    value_sums = pieces.take<W>(kMasked && kValues ? kAttentionThreads : 0);
    bytes = pieces.bytes();
  }
};

// How far a logit may exceed the base that is taken off before the base moves, which costs a pass over the results.
// Powers of two up to 2^8 are no loss in any number format here.
constexpr int kSlack = 8;

template <class T, int kDepth, bool kMasked, bool kValues>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_forward_kernel(MaskedAttentionArgs a, AttentionRows<Wide<T>> to, bool aligned) {
  using W = Wide<T>;
  using Memory = ForwardShared<T, kDepth, kMasked, kValues>;
  constexpr int kRows = kRowTiles<T, kDepth>, kKeys = kKeyTile<T, kDepth>, kTiles = kKeysAtOnce<T, kDepth> / 8;
  constexpr W kInfinity = static_cast<W>(INFINITY);
  Memory shared(shared_memory());
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t blocks_of_head = (a.tokens + kBlockRows<T, kDepth> - 1) / kBlockRows<T, kDepth>;
  const int64_t image_head = blockIdx.x / blocks_of_head, image = image_head / a.heads, head = image_head % a.heads;
  const int tokens = static_cast<int>(a.tokens), head_dim = static_cast<int>(a.head_dim);
  const int block_row = static_cast<int>(blockIdx.x % blocks_of_head) * kBlockRows<T, kDepth>;
  const int first_row = block_row + warp_id() * 16 * kRows;  // of this warp
  const bool active = first_row < tokens;
  const T* k = head_of<T>(a.k, image, head);
  const T* v = kValues ? head_of<T>(a.v, image, head) : nullptr;

  auto fetch_tile = [&](int first, int buffer) {
    fetch_rows<T, kDepth>(shared.keys + buffer * Memory::kTile, kKeys, k, a.k.stride_token, first, a.tokens, head_dim,
                          aligned);
    if constexpr (kValues)
      fetch_rows<T, kDepth>(shared.values + buffer * Memory::kTile, kKeys, v, a.v.stride_token, first, a.tokens,
                            head_dim, aligned);
    copy_commit();
  };
  // the key of this thread in a tile: read long before it is used
  struct Key {
    W bias, mask;
  };
  auto read_key = [&](int first) {
    if (tid >= kKeys) return Key{};
    return Key{bias_of_key<W>(a.size, image, first + tid, a.tokens),
               kMasked ? mask_of_key<W>(a.mask, image, first + tid, a.tokens) : W(0)};
  };
  auto put_key = [&](const Key& key, int buffer) {
    if (tid >= kKeys) return;
    shared.bias[buffer * kKeys + tid] = key.bias;
    if constexpr (kMasked) shared.mask[buffer * kKeys + tid] = key.mask;
  };

  fetch_rows<T, kDepth>(shared.queries, kBlockRows<T, kDepth>, head_of<T>(a.q, image, head), a.q.stride_token,
                        block_row, a.tokens, head_dim, aligned);
  fetch_tile(0, 0);
  put_key(read_key(0), 0);
  copy_wait<0>();
  __syncthreads();

  T* own_rows = shared.queries + warp_id() * 16 * kRows * stride_of<T, kDepth>;
  const Left<T, kRows, kDepth> left(own_rows);
  const W scale = static_cast<W>(a.scale * kLog2OfE);
  const bool has_class_row = first_row == 0 && a.importance != nullptr && !a.received;
  W* class_row = to.importance + image_head * a.tokens;

  W out[kRows][kDepth / 8][4] = {};                     // not used without values
  W base[kRows][2], top[kRows][2], sum[kRows][2] = {};  // of each row; top and sum of this lane's keys
  W value_sum = 0;                                      // of column tid % kDepth
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) base[r][h] = top[r][h] = -kInfinity;

  // keys from token `first`, at rows `at` .. of the buffers
  auto use_keys = [&](int first, int at) {
    W e[kRows][kTiles][4] = {};
    multiply_rows<T, kRows, kDepth, kTiles>(e, left, shared.keys + at * stride_of<T, kDepth>);

    // logits, and the largest of each row
    W highest[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r) highest[r][0] = highest[r][1] = -kInfinity;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const W bias = shared.bias[at + n * 8 + column_in_tile(i)];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            W& logit = e[r][n][2 * h + i];
            logit = logit * scale + bias;
            W& most = kMasked ? top[r][h] : highest[r][h];
            most = greater(most, logit);
          }
      }
    }
    // a token that is masked is seen by itself alone
    const bool own_keys = kMasked && first < first_row + 16 * kRows && first_row < first + kTiles * 8;
    const int own_key = first_row - first + lane_id() / 4;  // of the lane's first row
    auto for_seen = [&](auto body) {  // body(mask, what is there of a row and a key, r, h); in two copies, as few tiles
                                      // have own keys
      auto loop = [&](auto with_own_keys) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const W mask = shared.mask[at + n * 8 + column_in_tile(i)];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const bool own = with_own_keys && n * 8 + column_in_tile(i) == own_key + r * 16 + h * 8;
                body(own ? W(1) : mask, e[r][n][2 * h + i], r, h);
              }
          }
      };
      if (own_keys)
        loop(std::true_type{});
      else
        loop(std::false_type{});
    };
    if constexpr (kMasked)
      for_seen([&](W mask, W& logit, int r, int h) {
        logit += mask == 0 ? -kInfinity : W(0);
        highest[r][h] = greater(highest[r][h], logit);
      });
    if (has_class_row && lane_id() < 4) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = first + n * 8 + column_in_tile(i);
          if (key < tokens) class_row[key] = e[0][n][i];
        }
    }

    bool moves = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        highest[r][h] = row_max(highest[r][h]);
        moves = moves || highest[r][h] > base[r][h] + kSlack;
      }
    if (__ballot_sync(kAllLanes, moves) != 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (!(highest[r][h] > base[r][h])) continue;
          const W factor = power_of_two(base[r][h] - highest[r][h]);
          base[r][h] = highest[r][h];
          sum[r][h] *= factor;
          if constexpr (kValues) {
#pragma unroll
            for (int n = 0; n < kDepth / 8; ++n)
#pragma unroll
              for (int i = 0; i < 2; ++i) out[r][n][2 * h + i] *= factor;
          }
        }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const W taken_off = base[r][h] == -kInfinity ? W(0) : base[r][h];  // nothing seen yet
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) e[r][n][2 * h + i] = power_of_two(e[r][n][2 * h + i] - taken_off);
      }
    if constexpr (kMasked) for_seen([&](W mask, W& weight, int, int) { weight *= mask; });
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        W part = 0;  // summed by themselves first: short sums round less
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) part += e[r][n][2 * h + i];
        sum[r][h] += part;
      }
    if constexpr (kValues) {
      const Weights<T, kRows, kTiles> weights(e, shared.weights + warp_id() * Memory::kWeights);
      multiply_columns<T, kRows, kTiles, kDepth>(out, weights, shared.values + at * stride_of<T, kDepth>);
    }
  };

  int buffer = 0;
  for (int first = 0; first < tokens; first += kKeys, buffer ^= 1) {
    if (first > 0) {
      copy_wait<0>();
      __syncthreads();
    }
    const bool more = first + kKeys < tokens;
    Key next{};
    if (more) {
      fetch_tile(first + kKeys, buffer ^ 1);
      next = read_key(first + kKeys);
    }
    if (active)
      for (int part = 0; part < kKeys && first + part < tokens; part += kTiles * 8)
        use_keys(first + part, buffer * kKeys + part);
    if constexpr (kMasked && kValues) {
      const T* column = shared.values + buffer * Memory::kTile + tid % kDepth;
      if (tid < kAttentionThreads / kDepth * kDepth)
        for (int row = tid / kDepth; row < kKeys; row += kAttentionThreads / kDepth)
          value_sum += to_wide(column[row * stride_of<T, kDepth>]);
    }
    if (more) put_key(next, buffer ^ 1);
  }
  if constexpr (kMasked && kValues) {
    shared.value_sums[tid] = value_sum;
    __syncthreads();
  }
  if (!active) return;

  W inverse[kRows][2], floor[kRows][2] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const W total = row_sum(sum[r][h]);
      if constexpr (kMasked) {
        // the epsilons are relative to the largest exponential of all, the sums to the largest that is seen
        const W epsilon = static_cast<W>(kMaskedEpsilon);
        const W factor = power_of_two(base[r][h] - row_max(top[r][h]));
        inverse[r][h] = factor / (total * factor + epsilon);
        floor[r][h] = epsilon / static_cast<W>(a.tokens) / (total * factor + epsilon);
      } else {
        inverse[r][h] = 1 / total;
      }
    }

  if (a.importance != nullptr && a.received && lane_id() % 4 == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + r * 16 + h * 8 + lane_id() / 4;
        if (row >= tokens) continue;
        const int64_t at = image_head * a.tokens + row;
        to.base[at] = base[r][h];
        to.inverse[at] = inverse[r][h];
        if constexpr (kMasked) to.floor[at] = floor[r][h];
      }
  }
  if (has_class_row) {
    const W row_base = __shfl_sync(kAllLanes, base[0][0], 0), row_inverse = __shfl_sync(kAllLanes, inverse[0][0], 0),
            row_floor = __shfl_sync(kAllLanes, floor[0][0], 0);
    __syncwarp();  // other lanes have written the logits
    for (int j = lane_id(); j < tokens; j += kWarp) {
      const W seen = kMasked && j > 0 ? number_of<W>(a.mask, image, j) : W(1);
      class_row[j] = power_of_two(class_row[j] - row_base) * row_inverse * seen + row_floor;
    }
  }

  if constexpr (kValues) {
#pragma unroll
    for (int n = 0; n < kDepth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        W of_column = 0;
        if constexpr (kMasked) {
          const int column = n * 8 + column_in_tile(i);
#pragma unroll
          for (int part = 0; part < kAttentionThreads / kDepth; ++part)
            of_column += shared.value_sums[part * kDepth + column];
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            out[r][n][2 * h + i] = out[r][n][2 * h + i] * inverse[r][h] + of_column * floor[r][h];
      }
    store_rows<T, kRows, kDepth>(head_of<T>(a.out, image, head, a), a.heads * a.head_dim, first_row, a.tokens, head_dim,
                                 a.head_dim % Chunk<T>::kCount == 0, out, own_rows);
  }
}

// The forward pass, and importance if it is wanted.
template <bool kMasked, bool kValues>
const char* attention_forward(const MaskedAttentionArgs& a, void* scratch, Stream stream) {
  if (a.tokens > INT32_MAX / 2) return "too many tokens";
  const char* error = dispatch_heads(a.type, a.head_dim, [&](auto example, auto depth) {
    using T = decltype(example);
    constexpr int kDepth = depth;
    bool aligned = aligned_heads<T>(a.q, a.head_dim) && aligned_heads<T>(a.k, a.head_dim) &&
                   (!kValues || aligned_heads<T>(a.v, a.head_dim));
    int64_t blocks = a.images * a.heads * ((a.tokens + kBlockRows<T, kDepth> - 1) / kBlockRows<T, kDepth>);
    return launch(attention_forward_kernel<T, kDepth, kMasked, kValues>, blocks, kAttentionThreads,
                  ForwardShared<T, kDepth, kMasked, kValues>(nullptr).bytes, stream, a,
                  AttentionRows<Wide<T>>(a, kMasked, scratch), aligned);
  });
  if (error != nullptr || a.importance == nullptr) return error;
  if (a.received) {
    error = kMasked ? masked_received_rows(a, scratch, stream) : received_rows(a, scratch, stream);
    if (error != nullptr) return error;
  }
  Vector mask = kMasked && a.received ? a.mask : Vector{};
  // the rows of importance come first in scratch
  return head_mean({a.type, a.images, a.heads, a.tokens, a.prefix, scratch, a.received, mask, a.importance}, stream);
}

}  // namespace diffrate::cuda
