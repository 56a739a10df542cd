// What the attention kernels share: tile sizes, the way to a head, exponentials.
//
// Exponentials are powers of two: logits are scaled by scale * log2(e), and a size's logarithm is log2.
#pragma once

#include <stdio.h>

#include <type_traits>

#include "common/limits.h"
#include "cuda/tiles.cuh"

namespace diffrate::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr double kLog2OfE = 1.44269504088896340736;

// Keys that are in shared memory at a time: all of a block's must fit the 99 KB that every device has.
template <class T, int kDepth>
constexpr int kKeyTile = kTensorCores<T>                  ? 64
                         : sizeof(T) == 4 && kDepth <= 80 ? 32
                                                          : 16;

// Of these, keys that a warp handles at once: their logits must fit its registers beside the results.
template <class T, int kDepth>
constexpr int kKeysAtOnce = kKeyTile<T, kDepth> < 32 ? kKeyTile<T, kDepth> : 32;

// Tiles of 16 rows that a warp works on: as many as registers hold.
template <class T, int kDepth>
constexpr int kRowTiles = (kTensorCores<T> && kDepth <= 80) || (sizeof(T) == 4 && kDepth <= 64) ? 2 : 1;

__device__ inline float power_of_two(float exponent) { return exp2f(exponent); }
__device__ inline double power_of_two(double exponent) { return exp2(exponent); }
__device__ inline float greater(float a, float b) { return fmaxf(a, b); }  // of a number and NaN the number
__device__ inline double greater(double a, double b) { return fmax(a, b); }
__device__ inline float base_two_logarithm(float value) { return log2f(value); }
__device__ inline double base_two_logarithm(double value) { return log2(value); }

// What a key's size adds to its logits; -inf past the last token.
template <class W>
__device__ inline W bias_of_key(const Vector& sizes, int64_t image, int64_t token, int64_t tokens) {
  if (token >= tokens) return -static_cast<W>(INFINITY);
  if (sizes.data == nullptr) return 0;
  W size = number_of<W>(sizes, image, token);
  return base_two_logarithm(size > W(kTinySize) || size != size ? size : W(kTinySize));  // NaN stays NaN
}

// A key's mask; zero past the last token.
template <class W>
__device__ inline W mask_of_key(const Vector& mask, int64_t image, int64_t token, int64_t tokens) {
  return token < tokens ? number_of<W>(mask, image, token) : W(0);
}

// Token 0 of a head.
template <class T>
__device__ inline const T* head_of(const Heads& from, int64_t image, int64_t head) {
  return static_cast<const T*>(from.data) + image * from.stride_image + head * from.stride_head;
}

// The same of what is written: (B, N, H, D), contiguous, so tokens are heads * head_dim apart.
template <class T>
__device__ inline T* head_of(void* to, int64_t image, int64_t head, const AttentionArgs& a) {
  return static_cast<T*>(to) + (image * a.tokens * a.heads + head) * a.head_dim;
}

// Whether all rows can be read 16 bytes at a time.
template <class T>
bool aligned_heads(const Heads& from, int64_t head_dim) {
  return aligned_rows<T>(from.data, head_dim, from.stride_image, from.stride_token) &&
         from.stride_head % Chunk<T>::kCount == 0;
}

// The text is this thread's until the next one.
inline const char* too_many_head_channels(Type type) {
  static thread_local char text[80];
  snprintf(text, sizeof text, "the CUDA kernels take heads of at most %d channels%s",
           static_cast<int>(most_head_channels(type)), type == Type::f64 ? " in float64" : "");
  return text;
}

// Calls body(T{}, depth) with the C++ type of a dtype and, as a constant, the head's channels padded to whole tiles.
template <class Body>
const char* dispatch_heads(Type type, int64_t head_dim, Body body) {
  if (head_dim > most_head_channels(type)) return too_many_head_channels(type);
  return dispatch(type, [&](auto example) -> const char* {
    if constexpr (std::is_same_v<decltype(example), double>) {  // for checks of gradients: one depth serves
      return body(example, std::integral_constant<int, most_head_channels(Type::f64)>{});
    } else {
      if (head_dim <= 32) return body(example, std::integral_constant<int, 32>{});
      if (head_dim <= 64) return body(example, std::integral_constant<int, 64>{});
      if (head_dim <= 80) return body(example, std::integral_constant<int, 80>{});
      return body(example, std::integral_constant<int, most_head_channels(Type::f32)>{});
    }
  });
}

}  // namespace diffrate::cuda
