// What the CUDA kernels share.
//
// These are the first, plain kernels: right before fast. Every index that can grow with images * tokens * channels is
// 64-bit. Rows are worked on by one block each, blocks are numbered row by row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include "common/numeric.h"
#include "cuda/kernels.h"

namespace diffrate::cuda {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

__device__ inline float to_wide(float value) { return value; }
__device__ inline double to_wide(double value) { return value; }
__device__ inline float to_wide(__half value) { return __half2float(value); }
__device__ inline float to_wide(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ inline T from_wide(Wide<T> value) {
  return static_cast<T>(value);
}
template <>
__device__ inline __half from_wide<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_wide<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <class W>
__device__ inline W warp_sum(W value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sum over all threads of the block, in every thread.
template <class W>
__device__ inline W block_sum(W value) {
  __shared__ W partial[kThreads / kWarp];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  W total = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) total += partial[i];
  __syncthreads();
  return total;
}

template <class W>
__device__ inline W size_of(const Vector& size, int64_t image, int64_t token) {
  if (size.data == nullptr) return 1;
  return static_cast<const W*>(size.data)[image * size.stride_image + token * size.stride_token];
}

inline const char* launch_error() {
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int64_t item_bytes(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Calls body(T{}) with the C++ type of a dtype.
template <class Body>
const char* dispatch(Type type, Body body) {
  switch (type) {
    case Type::f32: return body(float{});
    case Type::f64: return body(double{});
    case Type::f16: return body(__half{});
    case Type::bf16: return body(__nv_bfloat16{});
  }
  return "unknown dtype";
}

// Writes the input position of each sorted position, (B, N). `wide` is the dtype that importance is summed in.
const char* sort_images(const Importance&, bool wide_is_double, int64_t images, int64_t tokens, int64_t prefix,
                        int64_t* order, cudaStream_t stream);

}  // namespace diffrate::cuda
