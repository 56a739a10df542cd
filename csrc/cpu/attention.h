// What the attention kernels share.
#pragma once

#include <limits>

#include "cpu/access.h"
#include "cpu/images.h"
#include "cpu/simd.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

// The channels of one token of a head.
template <class T>
const T* row_of(const Heads& heads, int64_t image, int64_t head, int64_t token) {
  return static_cast<const T*>(heads.data) + image * heads.stride_image + head * heads.stride_head +
         token * heads.stride_token;
}

// Rows of logits are padded to whole vectors; the padding is -inf and becomes (nearly) nothing in the softmax.
template <class W>
int64_t padded(int64_t tokens) {
  return (tokens + kLanes<W> - 1) / kLanes<W> * kLanes<W>;
}

// log(size) of every key, (padded), -inf in the padding.
template <class W>
void log_sizes(const Vector& sizes, int64_t tokens, int64_t image, W* bias) {
  for (int64_t j = 0; j < tokens; ++j) {
    W size = size_of<W>(sizes, image, j);
    bias[j] = sizes.data ? static_cast<W>(__builtin_log(size > W(kTinySize) || size != size ? size : W(kTinySize))) : 0;
  }
  for (int64_t j = tokens; j < padded<W>(tokens); ++j) bias[j] = -std::numeric_limits<W>::infinity();
}

// Replaces a padded row of logits by their exponentials after the largest is taken off, and returns 1 / their sum: the
// row times that is its softmax.
template <class W>
W exponentials(W* logits, int64_t length) {
  Vec<W> top = load(logits);
  for (int64_t j = kLanes<W>; j < length; j += kLanes<W>) {
    Vec<W> value = load(logits + j);
    top = value > top ? value : top;
  }
  W highest = top[0];
  for (int64_t i = 1; i < kLanes<W>; ++i) highest = top[i] > highest ? top[i] : highest;
  Vec<W> total = {};
  for (int64_t j = 0; j < length; j += kLanes<W>) {
    Vec<W> value = exp_nonpositive(load(logits + j) - highest);
    total += value;
    store(logits + j, value);
  }
  return 1 / sum(total);
}

// Importance of the patches (N-P) from one row of attention sums over `count` queries for each head, (heads, padded).
template <class W>
void mean_of_heads(const W* rows, int64_t heads, W count, int64_t prefix, int64_t tokens, W* importance) {
  for (int64_t j = prefix; j < tokens; ++j) {
    W total = 0;
    for (int64_t head = 0; head < heads; ++head) total += rows[head * padded<W>(tokens) + j];
    importance[j - prefix] = total / (static_cast<W>(heads) * count);
  }
}

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
