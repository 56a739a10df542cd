// Layer normalization of rows that were written before, or are sums of two, by a launch of its own. Within the kernel
// of prune_merge it took longer: that kernel leaves too few registers.
//
// A warp takes a row at a time, and asks for its next row before it computes with this one. Rows stay in registers;
// those that are too long, or double, or not aligned are read three times. The mean is subtracted before anything is
// squared, and what rounding left of it is made up for: rows far from zero lose nothing, and constant ones become zero.
#pragma once

#include "cuda/common.cuh"

namespace diffrate::cuda {

// What is normalised: the rows `x`, or their sums with the rows `residual`, rounded to T, which are written to `sum`.
template <class T>
struct NormRows {
  const T* x;
  const T* residual = nullptr;
  T* sum = nullptr;
};

template <class T, bool kAligned, bool kAdds>
struct NormStep {
  using W = Wide<T>;
  static constexpr int kCount = Chunk<T>::kCount;
  static constexpr int kSpan = kWarp * kCount;  // channels that a warp reads at once
  static constexpr bool kHolds = kAligned && sizeof(T) <= 4;
  static constexpr int kHeld = kHolds ? 1280 / kSpan : 1;  // so often, for a row that it holds: ViT-H has 1280 channels

  const LayerNorm& norm;
  const NormRows<T>& rows;
  int64_t channels;

  // Normalises the rows first, first + step, .. before `end` into norm.out; by a whole warp.
  __device__ void run(int64_t first, int64_t end, int64_t step) const {
    if constexpr (kHolds)
      if (channels <= kHeld * kSpan) return run_held(first, end, step);
    for (int64_t row = first; row < end; row += step) normalize_long(row * channels);
  }

  __device__ void run_held(int64_t first, int64_t end, int64_t step) const {
    Chunk<T> next[kHeld], residual[kAdds ? kHeld : 1];
    auto load_next = [&](int64_t row) {
      load(next, rows.x + row * channels);
      if constexpr (kAdds) load(residual, rows.residual + row * channels);
    };
    if (first < end) load_next(first);
    for (int64_t row = first; row < end; row += step) {
      Chunk<T> chunk[kHeld];
#pragma unroll
      for (int u = 0; u < kHeld; ++u)
        if constexpr (kAdds)
          chunk[u] = sum_of(next[u], residual[u]);
        else
          chunk[u] = next[u];
      if (row + step < end) load_next(row + step);
      if constexpr (kAdds)
#pragma unroll
        for (int u = 0; u < kHeld; ++u)
          store_chunk(chunk[u], rows.sum + row * channels, channel(u), channels, kAligned);
      normalize(chunk, static_cast<T*>(norm.out) + row * channels);
    }
  }

  __device__ int channel(int u) const { return u * kSpan + lane_id() * kCount; }
  // Whether there is number i of the chunk at channel c.
  __device__ bool inside(int64_t c, int i) const { return c + (kAligned ? 0 : i) < channels; }

  __device__ void load(Chunk<T> (&chunk)[kHeld], const T* row) const {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) chunk[u] = load_chunk(row, channel(u), channels, kAligned);
  }

  // Values past the last channel are zero. They are widened once more for each use, which takes fewer registers.
  __device__ void normalize(const Chunk<T> (&chunk)[kHeld], T* out) const {
    W sum = 0;
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (u * kSpan >= channels) break;  // for all lanes at once
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum += chunk[u][i];
    }
    W mean = warp_sum(sum) / static_cast<W>(channels), rest = 0, squares = 0;
    auto centred = [&](int u, int i) { return inside(channel(u), i) ? chunk[u][i] - mean : W(0); };
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (u * kSpan >= channels) break;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        W value = centred(u, i);
        rest += value;
        squares += value * value;
      }
    }
    Scaling by = scaling(rest, squares);
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (u * kSpan >= channels) break;
      W value[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] = centred(u, i);
      store(value, by, channel(u), out);
    }
  }

  // The row that begins at number `at`.
  __device__ void normalize_long(int64_t at) const {
    const T* row = kAdds ? rows.sum + at : rows.x + at;
    T* out = static_cast<T*>(norm.out) + at;
    W sum = 0, rest = 0, squares = 0;
    for (int64_t c = channel(0); c < channels; c += kSpan) {
      Chunk<T> chunk = load_chunk(rows.x + at, c, channels, kAligned);
      if constexpr (kAdds) {
        chunk = sum_of(chunk, load_chunk(rows.residual + at, c, channels, kAligned));
        store_chunk(chunk, rows.sum + at, c, channels, kAligned);  // this lane alone reads it again
      }
      for (int i = 0; i < kCount; ++i) sum += chunk[i];
    }
    W mean = warp_sum(sum) / static_cast<W>(channels);
    auto centred = [&](int64_t c, W(&value)[kCount]) {
      Chunk<T> chunk = load_chunk(row, c, channels, kAligned);
      for (int i = 0; i < kCount; ++i) value[i] = inside(c, i) ? chunk[i] - mean : W(0);
    };
    for (int64_t c = channel(0); c < channels; c += kSpan) {
      W value[kCount];
      centred(c, value);
      for (int i = 0; i < kCount; ++i) {
        rest += value[i];
        squares += value[i] * value[i];
      }
    }
    Scaling by = scaling(rest, squares);
    for (int64_t c = channel(0); c < channels; c += kSpan) {
      W value[kCount];
      centred(c, value);
      store(value, by, c, out);
    }
  }

  // A value, less the mean, is multiplied with `scale` and then moved.
  struct Scaling {
    W scale, move;
  };
  // From each lane's sums of the values, less the mean, and of their squares.
  __device__ Scaling scaling(W rest, W squares) const {
    rest = warp_sum(rest) / static_cast<W>(channels);
    W variance = warp_sum(squares) / static_cast<W>(channels) - rest * rest;
    if (variance < 0) variance = 0;  // by rounding; NaN stays
    W scale = 1 / sqrt(variance + static_cast<W>(norm.eps));
    return {scale, -rest * scale};
  }

  __device__ void store(const W (&value)[kCount], Scaling by, int64_t c, T* out) const {
    Chunk<T> weight = load_chunk(static_cast<const T*>(norm.weight), c, channels, kAligned), bias{};
    if (norm.bias != nullptr) bias = load_chunk(static_cast<const T*>(norm.bias), c, channels, kAligned);
    W result[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) result[i] = (value[i] * by.scale + by.move) * weight[i] + bias[i];
    store_chunk(Chunk<T>::of(result), out, c, channels, kAligned);
  }
};

constexpr int kNormThreads = 256;

template <class T, bool kAligned, bool kAdds>
__global__ void __launch_bounds__(kNormThreads)
    normalize_kernel(LayerNorm norm, NormRows<T> rows, int64_t count, int64_t channels) {
  int64_t first = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_id();
  NormStep<T, kAligned, kAdds>{norm, rows, channels}.run(first, count,
                                                         static_cast<int64_t>(gridDim.x) * warps_in_block());
}

// Normalises `count` contiguous rows.
template <class T, bool kAdds>
const char* normalize_rows(const LayerNorm& norm, const NormRows<T>& rows, int64_t count, int64_t channels,
                           Stream stream) {
  bool aligned = true;
  for (const void* data :
       {static_cast<const void*>(rows.x), static_cast<const void*>(rows.residual), static_cast<const void*>(rows.sum),
        norm.weight, norm.bias, static_cast<const void*>(norm.out)})
    aligned = aligned && aligned_rows<T>(data, channels, 0, 0);
  constexpr int64_t warps = kNormThreads / kWarp;
  int64_t blocks = (count + warps - 1) / warps, most = 8 * multiprocessors();
  return launch(aligned ? normalize_kernel<T, true, kAdds> : normalize_kernel<T, false, kAdds>,
                blocks < most ? blocks : most, kNormThreads, 0, stream, norm, rows, count, channels);
}

}  // namespace diffrate::cuda
