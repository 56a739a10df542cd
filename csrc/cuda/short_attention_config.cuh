// What a variant of short_attention.cuh is made of: rows in shared memory, what a lane holds.
#pragma once

#include <float.h>

#include <type_traits>

#include "cuda/attention.cuh"
#include "cuda/short_attention_variants.cuh"

namespace diffrate::cuda {

// Rows of kDepth 16-bit numbers in shared memory, so that eight rows at one chunk of 16 bytes lie in different banks:
// by padding, or by permuting the chunks of each row. Offsets are in bytes.
template <int kDepth, bool kSwizzled>
struct SharedRows {
  static constexpr int kChunks = kDepth / 8;
  static constexpr int kStride = kDepth * 2 + (kSwizzled ? 0 : 16);
  // Chunks trade places within groups of as many as a row's chunks and eight, all banks, have in common.
  static constexpr int kGroup = !kSwizzled ? 1 : kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;

  __device__ static int offset(int row, int chunk) { return row * kStride + (chunk ^ (row % 8 * kGroup / 8)) * 16; }
  // Of chunk 2 k + high in a row, from offset(row, high).
  __device__ static int step(int first_offset, int k) {
    return (first_offset ^ 2 * k % kGroup * 16) + 2 * k / kGroup * kGroup * 16;
  }
};

template <class T_, int kDepth_, ShortVariant kVariant_>
struct ShortConfig {
  using T = T_;
  static constexpr int kDepth = kDepth_;
  static constexpr ShortVariant kVariant = kVariant_;
  static constexpr bool kTensorSums = kVariant.tensor_sums;

  using Rows = SharedRows<kDepth, kVariant.swizzled>;
  static constexpr int kSteps = kDepth / 16;
  static constexpr int kStage = 16 * Rows::kStride;  // bytes

  static constexpr bool kHalf = std::is_same_v<T, __half>;
  // The largest sum of exponentials that is trusted: in half precision no weight is infinite then, and else values have
  // room, for 2^64 times as much is still a float.
  static constexpr float kTrustedSum = kHalf ? 0x1p15f : 0x1p64f;
  static constexpr uint32_t kOnes = kHalf ? 0x3c003c00 : 0x3f803f80;  // a pair
};

// What a lane holds of kTiles tiles of rows after the keys so far.
template <class C, int kTiles>
struct ShortRows {
  float out[kTiles][C::kDepth / 8][4] = {};
  float base[kTiles][2];  // units of q k
  float sum[kTiles][C::kTensorSums ? 4 : 2] = {};

  __device__ __forceinline__ ShortRows() {
    for_rows<kTiles>([&](int r, int h) { base[r][h] = -FLT_MAX; });
  }
  // Of a whole row if the tensor cores make it, else of what this lane has seen.
  __device__ __forceinline__ float& part_sum(int r, int h) { return sum[r][C::kTensorSums ? 2 * h : h]; }
};

}  // namespace diffrate::cuda
