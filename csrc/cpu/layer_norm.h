// Layer normalization of a row.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

// The mean is subtracted before anything is squared, and what rounding left of it is made up for: rows far from zero
// lose nothing, and constant ones become zero.
template <class T>
void normalize_row(const LayerNorm& norm, const T* row, T* out, int64_t channels) {
  using W = Wide<T>;
  constexpr int64_t lanes = kLanes<W>;
  const int64_t whole = channels / lanes * lanes;
  Vec<W> sums = {}, rests = {}, squares = {};
  for (int64_t c = 0; c < whole; c += lanes) sums += load(row + c);
  W total = sum(sums);
  for (int64_t c = whole; c < channels; ++c) total += to_wide(row[c]);
  const W mean = total / static_cast<W>(channels);

  for (int64_t c = 0; c < whole; c += lanes) {
    Vec<W> value = load(row + c) - mean;
    rests += value;
    squares = multiply_add(value, value, squares);
  }
  W rest = sum(rests), square = sum(squares);
  for (int64_t c = whole; c < channels; ++c) {
    W value = to_wide(row[c]) - mean;
    rest += value;
    square += value * value;
  }
  rest /= static_cast<W>(channels);
  W variance = square / static_cast<W>(channels) - rest * rest;
  if (variance < 0) variance = 0;  // by rounding; NaN stays
  const W scale = 1 / static_cast<W>(__builtin_sqrt(variance + static_cast<W>(norm.eps)));

  const T* weight = static_cast<const T*>(norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
  for_vectors<W>(channels, [&](int64_t c, auto load_at, auto store_at) {
    Vec<W> value = (load_at(row + c) - mean - rest) * scale * load_at(weight + c);
    if (bias) value += load_at(bias + c);
    store_at(out + c, value);
  });
}

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
