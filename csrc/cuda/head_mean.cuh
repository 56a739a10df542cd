// Importance from a row of attention for each head.
#pragma once

#include "cuda/common.cuh"

namespace diffrate::cuda {

struct HeadMeanArgs {
  Type type;  // of the features
  int64_t images, heads, tokens, prefix;
  const void* rows;  // (B, H, N), wide: the class token's attention, or sums over queries
  bool received;     // the rows are sums over queries: divide by their number, too
  Vector mask;       // the queries that count; data may be null: all
  void* importance;  // (B, N-P), wide
};

const char* head_mean(const HeadMeanArgs&, Stream stream);

}  // namespace diffrate::cuda
