// The sums of the attention map's columns in one pass, in half precision, of heads whose queries and keys fit shared
// memory: the sequences of vision transformers.
//
// A block has a head of an image, and two of its warps share a tile of 16 queries, each with half of the keys. So all
// logits of the tile are in registers, and none is computed twice: once both warps know the largest and the sum of
// their halves, a query's exponentials are divided by their sum and added to the columns. Every logit costs its part of
// a product, a multiply-add, a maximum, a subtraction, an exponential and two additions. At B = 256, N = 197, D = 64,
// H = 12 an H200 needs 36 us for the exponentials alone, about as much to read keys out of shared memory, and 37 for
// the bytes.
#pragma once

#include "cuda/attention.cuh"

namespace diffrate::cuda {

template <class T_, int kDepth_, int kKeyTiles_>
struct OnePassConfig {
  using T = T_;
  static constexpr int kDepth = kDepth_;
  static constexpr int kKeyTiles = kKeyTiles_;  // of 16 keys, that a warp has at most
  static constexpr int kStride = stride_of<T, kDepth>;
  // Pairs of warps in a block, and blocks on a multiprocessor: twelve warps, in as many blocks as have room.
  static constexpr int kPairs = kDepth <= 64 && kKeyTiles <= 7 ? 2 : 3;
  static constexpr int kBlocks = 6 / kPairs;
  static constexpr int kWarps = 2 * kPairs, kThreads = kWarps * kWarp;
  static constexpr int kMostTokens = 2 * kKeyTiles * 16;
  // Tiles of keys between which there is no branch, so that products and exponentials of several overlap. A group that
  // has any has all: what stands for those that are missing weighs nothing.
  static constexpr int kGroup = 3;
};

// Of a query's logits to half of the keys: the largest, and the sum of exponentials relative to it.
struct HalfRow {
  float top, sum;
};

template <class C>
struct OnePassShared {
  using T = typename C::T;

  T *queries, *keys;  // (padded, stride): the padding of keys is zero
  float* bias;        // (2, kKeyTiles * 16): of each half's keys, -inf where there are none
  HalfRow* halves;    // (2, kPairs, 2, 16): two buffers
  float* sums;        // (kPairs, padded)
  int64_t bytes;

  __device__ __host__ OnePassShared(unsigned char* memory, int padded) {
    Shared pieces(memory);
    queries = pieces.take<T>(padded * C::kStride);
    keys = pieces.take<T>(padded * C::kStride);
    bias = pieces.take<float>(C::kMostTokens);
    halves = pieces.take<HalfRow>(2 * C::kPairs * 2 * 16);
    sums = pieces.take<float>(C::kPairs * padded);
    bytes = pieces.bytes();
  }
};

__host__ __device__ inline int tiles_of_tokens(int64_t tokens) { return static_cast<int>((tokens + 15) / 16); }

template <class C>
struct OnePass {
  using T = typename C::T;
  using Logits = float[2 * C::kKeyTiles][4];  // then exponentials
  using Columns = float[2 * C::kKeyTiles][2];

  const AttentionArgs& a;
  const int tokens, tiles, padded;
  const int64_t image, head;
  const OnePassShared<C> shared;
  int pair, half;           // of this warp
  int key_tile, key_tiles;  // its keys

  __device__ explicit OnePass(const AttentionArgs& args)
      : a(args),
        tokens(static_cast<int>(args.tokens)),
        tiles(tiles_of_tokens(args.tokens)),
        padded(tiles * 16),
        image(blockIdx.x / static_cast<unsigned>(args.heads)),
        head(blockIdx.x % static_cast<unsigned>(args.heads)),
        shared(shared_memory(), padded) {
    // warps with more to do are others in other blocks: warp i of every block runs on the same scheduler
    const int turned = static_cast<int>((threadIdx.x / kWarp + blockIdx.x) % C::kWarps);
    pair = turned / 2;
    half = turned % 2;
    key_tile = first_tile(half);
    key_tiles = tiles_of_half(half);
  }

  __device__ int first_tile(int of_half) const { return of_half == 0 ? 0 : (tiles + 1) / 2; }
  __device__ int tiles_of_half(int of_half) const { return of_half == 0 ? (tiles + 1) / 2 : tiles / 2; }

  __device__ void fetch(bool aligned) const {
    fetch_rows<T, C::kDepth>(shared.queries, tokens, head_of<T>(a.q, image, head), a.q.stride_token, 0, a.tokens,
                             static_cast<int>(a.head_dim), aligned);
    fetch_rows<T, C::kDepth>(shared.keys, padded, head_of<T>(a.k, image, head), a.k.stride_token, 0, a.tokens,
                             static_cast<int>(a.head_dim), aligned);
    copy_commit();
    for (int i = static_cast<int>(threadIdx.x); i < C::kMostTokens; i += C::kThreads) {
      const int of_half = i / (C::kKeyTiles * 16), key = i % (C::kKeyTiles * 16);
      const bool has_key = key < tiles_of_half(of_half) * 16;
      shared.bias[i] =
          has_key ? bias_of_key<float>(a.size, image, first_tile(of_half) * 16 + key, a.tokens) : -INFINITY;
    }
    copy_wait<0>();
    __syncthreads();
  }

  // Calls body(first, count) for each group of tiles of the warp's keys.
  template <class Body>
  __device__ __forceinline__ void for_groups(Body body) const {
    constexpr int kLast = C::kKeyTiles % C::kGroup;
#pragma unroll
    for (int first = 0; first + C::kGroup <= C::kKeyTiles; first += C::kGroup)
      if (first < key_tiles) body(first, std::integral_constant<int, C::kGroup>{});
    if constexpr (kLast > 0)
      if (C::kKeyTiles - kLast < key_tiles) body(C::kKeyTiles - kLast, std::integral_constant<int, kLast>{});
  }
  // Calls body(n) for each 8 keys of these.
  template <class Body>
  __device__ __forceinline__ void for_keys(Body body) const {
    for_groups([&](int first, auto count) {
#pragma unroll
      for (int n = 0; n < 2 * decltype(count)::value; ++n) body(2 * first + n);
    });
  }

  __device__ __forceinline__ void score(int tile, Logits& e) const {
    constexpr int kRow = C::kStride * static_cast<int>(sizeof(T)), kTile = 16 * kRow;  // bytes
    const int lane = lane_id(), last = tiles - 1 - key_tile;
    const int query = tile * 16 + lane % 16;  // past the last one that once more: zeros could meet infinite keys
    const SharedAddress from =
        shared_address(shared.queries) + (query < tokens ? query : tokens - 1) * kRow + lane / 16 * 16;
    uint32_t queries[C::kDepth / 16][4];
#pragma unroll
    for (int k = 0; k < C::kDepth / 16; ++k) load_matrices(queries[k], from + k * 32);
    const SharedAddress row =
        shared_address(shared.keys) + key_tile * kTile + (lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 16;
    for_groups([&](int first, auto count) {
      constexpr int kCount = decltype(count)::value;
#pragma unroll
      for (int n = 0; n < 2 * kCount; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) e[2 * first + n][i] = 0;
#pragma unroll
      for (int k = 0; k < C::kDepth / 16; ++k)
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
          const int t = first + u;
          uint32_t b[4];
          load_matrices(b, row + (t < last ? t : last) * kTile + k * 32);
          multiply_add<T>(e[2 * t], queries[k], b[0], b[1], e[2 * t]);
          multiply_add<T>(e[2 * t + 1], queries[k], b[2], b[3], e[2 * t + 1]);
        }
    });
  }

  // From products to exponentials, relative to the largest logit of this half.
  __device__ __forceinline__ void exponentiate(Logits& e, HalfRow (&rows)[2]) const {
    const float scale = static_cast<float>(a.scale * kLog2OfE);
    const float* bias = shared.bias + half * C::kKeyTiles * 16 + lane_id() % 4 * 2;
    for (int h = 0; h < 2; ++h) rows[h] = {-INFINITY, 0};
    for_keys([&](int n) {
      const Pair<float> of_keys = *reinterpret_cast<const Pair<float>*>(bias + n * 8);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        e[n][2 * h] = e[n][2 * h] * scale + of_keys.first;
        e[n][2 * h + 1] = e[n][2 * h + 1] * scale + of_keys.second;
        rows[h].top = greater(rows[h].top, greater(e[n][2 * h], e[n][2 * h + 1]));
      }
    });
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows[h].top = row_max(rows[h].top);
      base[h] = rows[h].top == -INFINITY ? 0 : rows[h].top;  // the other half may have more
    }
    for_keys([&](int n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        e[n][i] = power_of_two(e[n][i] - base[i / 2]);
        rows[i / 2].sum += e[n][i];
      }
    });
    for (int h = 0; h < 2; ++h) rows[h].sum = row_sum(rows[h].sum);
  }

  __device__ HalfRow* half_rows(int round, int of_half) const {
    return shared.halves + ((round % 2 * C::kPairs + pair) * 2 + of_half) * 16 + lane_id() / 4;
  }
  __device__ void tell(int round, const HalfRow (&rows)[2]) const {
    if (lane_id() % 4 != 0) return;
    for (int h = 0; h < 2; ++h) half_rows(round, half)[h * 8] = rows[h];
  }

  // What an exponential of this half counts: one through the sum of both, or nothing where there is no query.
  __device__ float weight(int round, int tile, int h, const HalfRow& own) const {
    if (tile * 16 + h * 8 + lane_id() / 4 >= tokens) return 0;
    const HalfRow other = half_rows(round, 1 - half)[h * 8];
    const float top = greater(own.top, other.top);
    const float mine = power_of_two(own.top - top);
    return mine / (own.sum * mine + other.sum * power_of_two(other.top - top));
  }

  __device__ __forceinline__ void work(Columns& columns) const {
#pragma unroll 1
    for (int round = 0; round * C::kPairs < tiles; ++round) {
      const int tile = round * C::kPairs + pair;
      Logits e;
      HalfRow rows[2];
      if (tile < tiles) {
        score(tile, e);
        exponentiate(e, rows);
        tell(round, rows);
      }
      __syncthreads();  // the next round has another buffer
      if (tile < tiles) {
        const float low = weight(round, tile, 0, rows[0]), high = weight(round, tile, 1, rows[1]);
        for_keys([&](int n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) columns[n][i] += e[n][i] * low, columns[n][i] += e[n][2 + i] * high;
        });
      }
    }
  }

  // The sums of all queries, in `to` (N).
  __device__ __forceinline__ void write(Columns& columns, float* to) const {
    float* of_pair = shared.sums + pair * padded + key_tile * 16 + lane_id() * 2;
    for_keys([&](int n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int offset = 4; offset < kWarp; offset *= 2)
          columns[n][i] += __shfl_xor_sync(kAllLanes, columns[n][i], offset);
        if (lane_id() < 4 && n < 2 * key_tiles) of_pair[n * 8 + i] = columns[n][i];
      }
    });
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < tokens; j += C::kThreads) {
      float sum = 0;
      for (int p = 0; p < C::kPairs; ++p) sum += shared.sums[p * padded + j];
      to[j] = sum;
    }
  }
};

// sums: (B, H, N).
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    received_one_pass_kernel(AttentionArgs a, float* sums, bool aligned) {
  const OnePass<C> pass(a);
  pass.fetch(aligned);
  typename OnePass<C>::Columns columns = {};
  pass.work(columns);
  pass.write(columns, sums + blockIdx.x * a.tokens);
}

}  // namespace diffrate::cuda
