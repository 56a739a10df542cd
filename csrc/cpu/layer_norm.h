// Layer normalization of a row.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

// Calls body(channel, chain) for each whole vector of a row. Sums of a chain wait for each other, those of others do
// not.
constexpr int64_t kChains = 4;
template <class W, class Body>
inline __attribute__((always_inline)) void for_whole_vectors(int64_t channels, Body body) {
  constexpr int64_t lanes = kLanes<W>;
  int64_t c = 0;
  for (; c + kChains * lanes <= channels; c += kChains * lanes)
    for (int64_t i = 0; i < kChains; ++i) body(c + i * lanes, i);
  for (; c + lanes <= channels; c += lanes) body(c, 0);
}

// Normalises a row of T, which may come widened. The mean is subtracted before anything is squared, and what rounding
// left of it is made up for: rows far from zero lose nothing, and constant ones become zero.
template <class T, class From>
void normalize_row(const LayerNorm& norm, const From* row, T* out, int64_t channels) {
  using W = Wide<T>;
  const int64_t whole = channels / kLanes<W> * kLanes<W>;
  Vec<W> sums[kChains] = {}, rests[kChains] = {}, squares[kChains] = {};
  auto total = [](const Vec<W>(&chains)[kChains]) { return sum((chains[0] + chains[1]) + (chains[2] + chains[3])); };
  for_whole_vectors<W>(channels, [&](int64_t c, int64_t i) { sums[i] += load(row + c); });
  W mean = total(sums);
  for (int64_t c = whole; c < channels; ++c) mean += to_wide(row[c]);
  mean /= static_cast<W>(channels);

  for_whole_vectors<W>(channels, [&](int64_t c, int64_t i) {
    Vec<W> value = load(row + c) - mean;
    rests[i] += value;
    squares[i] = multiply_add(value, value, squares[i]);
  });
  W rest = total(rests), variance = total(squares);
  for (int64_t c = whole; c < channels; ++c) {
    W value = to_wide(row[c]) - mean;
    rest += value;
    variance += value * value;
  }
  rest /= static_cast<W>(channels);
  variance = variance / static_cast<W>(channels) - rest * rest;
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
