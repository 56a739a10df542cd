// What the CUDA kernels share: number formats, warps, the way from an argument to a row.
//
// Every index that can grow with images * tokens * channels is 64-bit.
#pragma once

#include <type_traits>

#include "common/numeric.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace diffrate::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

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

template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  return bits_as<uint32_t>(__floats2half2_rn(low, high));
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}

// 16 bytes of a row: what one thread reads and writes at a time. As words, which stay whole until a number is asked
// for: as an array of 16-bit numbers a chunk would be taken apart when it arrives, and so waited for.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kCount = 16 / sizeof(T);
  uint32_t words[4];

  __device__ T number(int i) const {
    if constexpr (sizeof(T) == 2) return bits_as<T>(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16));
    if constexpr (sizeof(T) == 4) return bits_as<T>(words[i]);
    if constexpr (sizeof(T) == 8) return bits_as<T>(uint64_t{words[i * 2 + 1]} << 32 | words[i * 2]);
  }
  __device__ Wide<T> operator[](int i) const { return to_wide(number(i)); }

  __device__ static Chunk of(const Wide<T> (&values)[kCount]) {
    Chunk chunk;
    if constexpr (sizeof(T) == 2)
      for (int i = 0; i < 4; ++i) chunk.words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    else
      __builtin_memcpy(chunk.words, values, sizeof(Chunk));
    return chunk;
  }
};

template <class T>
__device__ inline Chunk<T> read_chunk(const T* from) {
  uint4 words = *reinterpret_cast<const uint4*>(from);
  return {{words.x, words.y, words.z, words.w}};
}
template <class T>
__device__ inline void write_chunk(const Chunk<T>& chunk, T* to) {
  *reinterpret_cast<uint4*>(to) = {chunk.words[0], chunk.words[1], chunk.words[2], chunk.words[3]};
}

// The sum, rounded to T. In half precision it is rounded once, which for a sum is the same as by way of float, as eager
// PyTorch does it: float has more than twice the digits.
template <class T>
__device__ inline Chunk<T> sum_of(const Chunk<T>& a, const Chunk<T>& b) {
  Chunk<T> sum;
  if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sum.words[i] = bits_as<uint32_t>(__hadd2(bits_as<Pair>(a.words[i]), bits_as<Pair>(b.words[i])));
  } else {
    Wide<T> numbers[Chunk<T>::kCount];
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; ++i) numbers[i] = a[i] + b[i];
    sum = Chunk<T>::of(numbers);
  }
  return sum;
}

// The chunk at channels c .. of a row: one access where the row is `aligned`, else number by number. Channels from
// `channels` on are zero when read and not written.
template <class T>
__device__ inline Chunk<T> load_chunk(const T* row, int64_t c, int64_t channels, bool aligned) {
  if (aligned) return c < channels ? read_chunk(row + c) : Chunk<T>{};
  T numbers[Chunk<T>::kCount];
  for (int i = 0; i < Chunk<T>::kCount; ++i) numbers[i] = c + i < channels ? row[c + i] : from_wide<T>(0);
  Chunk<T> chunk;
  __builtin_memcpy(chunk.words, numbers, sizeof chunk);
  return chunk;
}
template <class T>
__device__ inline void store_chunk(const Chunk<T>& chunk, T* row, int64_t c, int64_t channels, bool aligned) {
  if (aligned) {
    if (c < channels) write_chunk(chunk, row + c);
    return;
  }
  for (int i = 0; i < Chunk<T>::kCount; ++i)
    if (c + i < channels) row[c + i] = chunk.number(i);
}

// Whether all rows that start at `data` and multiples of the strides from it can be read 16 bytes at a time.
template <class T>
bool aligned_rows(const void* data, int64_t channels, int64_t stride_image, int64_t stride_token) {
  constexpr int64_t count = Chunk<T>::kCount;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && channels % count == 0 && stride_image % count == 0 &&
         stride_token % count == 0;
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warps_in_block() { return static_cast<int>(blockDim.x) / kWarp; }

// The sum over all lanes, the same in every lane.
template <class W>
__device__ inline W warp_sum(W value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <class T>
__device__ inline const T* row_of(const Tokens& x, int64_t image, int64_t token) {
  return static_cast<const T*>(x.data) + image * x.stride_image + token * x.stride_token;
}

template <class W>
__device__ inline W number_of(const Vector& vector, int64_t image, int64_t token) {
  return static_cast<const W*>(vector.data)[image * vector.stride_image + token * vector.stride_token];
}

// An optional vector, such as the sizes: all ones where there is none.
template <class W>
__device__ inline W size_of(const Vector& size, int64_t image, int64_t token) {
  return size.data == nullptr ? W(1) : number_of<W>(size, image, token);
}

template <class T>
__device__ inline T not_a_number() {
  return static_cast<T>(NAN);
}

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

}  // namespace diffrate::cuda
