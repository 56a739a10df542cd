// Products of small matrices by one warp: what the attention kernels are made of.
//
// A warp works on kRows tiles of 16 rows. Results are fragments: of each 16 x 8 tile a lane holds four numbers, with
// g = lane / 4 and t = lane % 4 those at (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). Half precision multiplies
// on the tensor cores; float and double have the same fragments and multiply on the ordinary units. Operands lie in
// shared memory as rows of kDepth numbers, a multiple of 16, and stride_of<T, kDepth>: what is longer than the data is
// zero.
#pragma once

#include "cuda/common.cuh"

namespace diffrate::cuda {

template <class T>
constexpr bool kTensorCores = sizeof(T) == 2;

// 16 bytes of padding: eight rows at the same column then lie in different banks.
template <class T, int kDepth>
constexpr int stride_of = kDepth + Chunk<T>::kCount;

// The row and the column, within a 16 x 8 tile, of a fragment's number i = 0..3 in this lane.
__device__ inline int row_in_tile(int i) { return lane_id() / 4 + (i / 2) * 8; }
__device__ inline int column_in_tile(int i) { return lane_id() % 4 * 2 + i % 2; }

// Unrolled loops over what a lane holds of a fragment of kRows x kTiles tiles: body(r, h) for row h = 0, 1 of row tile
// r, body(n, i) for column i = 0, 1 of column tile n, body(r, n, i) for number i = 0..3 of tile (r, n).
template <int kRows, class Body>
__device__ __forceinline__ void for_rows(Body body) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) body(r, h);
}
template <int kTiles, class Body>
__device__ __forceinline__ void for_columns(Body body) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) body(n, i);
}
template <int kRows, int kTiles, class Body>
__device__ __forceinline__ void for_fragment(Body body) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) body(r, n, i);
}

// Starts to copy `rows` rows of a head (`head`: its token 0), from token `first`, to shared memory, by all threads of
// the block. Tokens from `tokens` on and channels from `head_dim` on become zero. They have arrived after copy_commit,
// copy_wait and __syncthreads.
template <class T, int kDepth>
__device__ void fetch_rows(T* to, int rows, const T* head, int64_t stride_token, int64_t first, int64_t tokens,
                           int head_dim, bool aligned) {
  constexpr int kChunks = kDepth / Chunk<T>::kCount;
  for (int i = static_cast<int>(threadIdx.x); i < rows * kChunks; i += static_cast<int>(blockDim.x)) {
    int row = i / kChunks, c = i % kChunks * Chunk<T>::kCount;
    T* at = to + row * stride_of<T, kDepth> + c;
    bool inside = first + row < tokens && c < head_dim;
    const T* from = inside ? head + (first + row) * stride_token : head;
    if (aligned)
      copy_async(at, inside ? from + c : from, inside);
    else
      write_chunk(load_chunk(from, c, inside ? head_dim : 0, false), at);
  }
}

// The left operand of multiply_rows: the warp's rows, from shared memory.
template <class T, int kRows, int kDepth, bool = kTensorCores<T>>
struct Left {
  const T* rows;
  __device__ explicit Left(const T* shared_rows) : rows(shared_rows) {}
};
template <class T, int kRows, int kDepth>
struct Left<T, kRows, kDepth, true> {
  uint32_t a[kRows][kDepth / 16][4];
  __device__ explicit Left(const T* shared_rows) {
    const T* row = shared_rows + lane_id() % 16 * stride_of<T, kDepth> + lane_id() / 16 * 8;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) load_matrices(a[r][k], row + r * 16 * stride_of<T, kDepth> + k * 16);
  }
};

// out += left right^T: the dot products of the warp's rows with 8 * kTiles rows at `right`.
template <class T, int kRows, int kDepth, int kTiles>
__device__ void multiply_rows(Wide<T> (&out)[kRows][kTiles][4], const Left<T, kRows, kDepth>& left, const T* right) {
  constexpr int kStride = stride_of<T, kDepth>;
  int lane = lane_id();
  if constexpr (kTensorCores<T>) {
    static_assert(kTiles % 2 == 0);
    const T* row = right + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        load_matrices(b, row + n * 8 * kStride + k * 16);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          multiply_accumulate<T>(out[r][n], left.a[r][k], b[0], b[1]);
          multiply_accumulate<T>(out[r][n + 1], left.a[r][k], b[2], b[3]);
        }
      }
    }
  } else {
    constexpr int kCount = Chunk<T>::kCount;
    const T* mine = left.rows + lane / 4 * kStride;
    const T* row = right + lane % 4 * 2 * kStride;
    for (int k = 0; k < kDepth; k += kCount) {
      Chunk<T> a[kRows][2];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) a[r][h] = read_chunk(mine + (r * 16 + h * 8) * kStride + k);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          Chunk<T> b = read_chunk(row + (n * 8 + h) * kStride + k);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              out[r][n][h] += a[r][0][i] * b[i];
              out[r][n][2 + h] += a[r][1][i] * b[i];
            }
        }
    }
  }
}

// Two neighbours, read at once: left to itself the compiler may read them one by one.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// The left operand of multiply_columns: what the warp has computed, 16 * kRows rows of 8 * kTiles weights. `buffer` is
// shared memory of the warp's own, of weights_buffer<T, kRows, kTiles> numbers.
template <class T, int kRows, int kTiles>
constexpr int weights_buffer = kTensorCores<T> ? 0 : 16 * kRows * stride_of<T, 8 * kTiles>;

template <class T, int kRows, int kTiles, bool = kTensorCores<T>>
struct Weights {
  static constexpr int kStride = stride_of<T, 8 * kTiles>;
  const T* rows;
  __device__ Weights(const T (&from)[kRows][kTiles][4], T* buffer) : rows(buffer) {
    __syncwarp();  // other lanes may still read what was there
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          buffer[(r * 16 + row_in_tile(i)) * kStride + n * 8 + column_in_tile(i)] = from[r][n][i];
    __syncwarp();
  }
};
template <class T, int kRows, int kTiles>
struct Weights<T, kRows, kTiles, true> {
  uint32_t a[kRows][kTiles / 2][4];
  __device__ Weights(const float (&from)[kRows][kTiles][4], T*) {
    // a result's fragments are an operand's, but for the number format
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kTiles / 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[r][k][i] = pack<T>(from[r][2 * k + i / 2][i % 2 * 2], from[r][2 * k + i / 2][i % 2 * 2 + 1]);
  }
};

// out += weights right: the sums of the 8 * kTiles rows at `right`, weighted.
template <class T, int kRows, int kTiles, int kDepth>
__device__ void multiply_columns(Wide<T> (&out)[kRows][kDepth / 8][4], const Weights<T, kRows, kTiles>& weights,
                                 const T* right) {
  constexpr int kStride = stride_of<T, kDepth>;
  int lane = lane_id();
  if constexpr (kTensorCores<T>) {
    const T* row = right + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kTiles / 2; ++k) {
#pragma unroll
      for (int n = 0; n < kDepth / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, row + k * 16 * kStride + n * 8);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          multiply_accumulate<T>(out[r][n], weights.a[r][k], b[0], b[1]);
          multiply_accumulate<T>(out[r][n + 1], weights.a[r][k], b[2], b[3]);
        }
      }
    }
  } else {
    constexpr int kCount = Chunk<T>::kCount;
    constexpr int kWeightStride = Weights<T, kRows, kTiles>::kStride;
    const T* mine = weights.rows + lane / 4 * kWeightStride;
    for (int k = 0; k < kTiles * 8; k += kCount) {
      Chunk<T> a[kRows][2];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) a[r][h] = read_chunk(mine + (r * 16 + h * 8) * kWeightStride + k);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T* row = right + (k + i) * kStride + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kDepth / 8; ++n) {
          const Pair<T> b = *reinterpret_cast<const Pair<T>*>(row + n * 8);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            out[r][n][0] += a[r][0][i] * b.first;
            out[r][n][2] += a[r][1][i] * b.first;
            out[r][n][1] += a[r][0][i] * b.second;
            out[r][n][3] += a[r][1][i] * b.second;
          }
        }
      }
    }
  }
}

// Writes the warp's rows, tokens `first` .. of a head (`head`: its token 0). `stage` is shared memory of
// the warp's own for 16 * kRows rows, so that memory is written in whole chunks.
template <class T, int kRows, int kDepth>
__device__ void store_rows(T* head, int64_t stride_token, int64_t first, int64_t tokens, int head_dim, bool aligned,
                           const Wide<T> (&from)[kRows][kDepth / 8][4], T* stage) {
  constexpr int kChunks = kDepth / Chunk<T>::kCount;
  __syncwarp();  // other lanes may still read what was there
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int n = 0; n < kDepth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        stage[(r * 16 + row_in_tile(i)) * stride_of<T, kDepth> + n * 8 + column_in_tile(i)] =
            from_wide<T>(from[r][n][i]);
  __syncwarp();
  for (int i = lane_id(); i < 16 * kRows * kChunks; i += kWarp) {
    int row = i / kChunks, c = i % kChunks * Chunk<T>::kCount;
    if (first + row >= tokens) continue;
    store_chunk(read_chunk(stage + row * stride_of<T, kDepth> + c), head + (first + row) * stride_token, c, head_dim,
                aligned);
  }
}

// Reduces over the four lanes that share a fragment's row; the same in each of them.
template <class W>
__device__ inline W row_sum(W value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
template <class W>
__device__ inline W row_max(W value) {
  for (int offset = 1; offset <= 2; offset *= 2) {
    W other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace diffrate::cuda
