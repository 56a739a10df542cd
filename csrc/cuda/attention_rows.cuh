// Where the attention kernels work, and what importance is made of on the way.
#pragma once

#include "cuda/attention.cuh"

namespace diffrate::cuda {

// The rows (tokens of one head) that a block and a warp of it work on.
template <int kWarpRows, int kBlockRows>
struct HeadRows {
  int64_t image_head, image, head;  // image_head counts the heads of all images
  int block_row, warp_row;          // the first of the block, and of the warp

  __device__ explicit HeadRows(const AttentionArgs& a) {
    const unsigned blocks_of_head = static_cast<unsigned>((a.tokens + kBlockRows - 1) / kBlockRows);
    image_head = blockIdx.x / blocks_of_head;
    image = image_head / a.heads;
    head = image_head % a.heads;
    block_row = static_cast<int>(blockIdx.x % blocks_of_head) * kBlockRows;
    warp_row = block_row + warp_id() * kWarpRows;
  }

  // The token of row h = 0, 1 of row tile r in this lane.
  __device__ int token(int r, int h) const { return warp_row + r * 16 + h * 8 + lane_id() / 4; }

  // Of `columns` tokens from `first` on: whether any is also a row of this warp.
  __device__ bool overlaps(int first, int columns) const {
    return first < warp_row + kWarpRows && warp_row < first + columns;
  }

  static int64_t blocks(const AttentionArgs& a) {
    return a.images * a.heads * ((a.tokens + kBlockRows - 1) / kBlockRows);
  }
};

// What the forward pass writes to scratch memory, for importance. Query i's attention to key j is
//   plain:  exp2(logit_ij - base_i) inverse_i
//   masked: exp2(logit_ij - base_i) inverse_i (mask_j, or 1 where i = j) + floor_i
template <class W>
struct AttentionRows {
  W* importance;              // (B, H, N): the class token's attention, or sums over queries
  W *base, *inverse, *floor;  // (B, H, N), for attention received
  int64_t bytes;

  AttentionRows(const AttentionArgs& a, bool masked, void* scratch) {
    int64_t count = a.importance == nullptr ? 0 : a.images * a.heads * a.tokens;
    importance = static_cast<W*>(scratch);
    base = importance + count;
    inverse = base + (a.received ? count : 0);
    floor = inverse + (a.received ? count : 0);
    bytes = (floor + (a.received && masked ? count : 0) - importance) * static_cast<int64_t>(sizeof(W));
  }
};

inline int64_t attention_rows_bytes(const AttentionArgs& a, bool masked) {
  return a.type == Type::f64 ? AttentionRows<double>(a, masked, nullptr).bytes
                             : AttentionRows<float>(a, masked, nullptr).bytes;
}

// Memory for AttentionRows: that of the result, where the class token's rows are the result.
inline void* attention_rows_memory(const AttentionArgs& a, bool masked, const Scratch& scratch) {
  return a.by_head ? a.importance : scratch.take(attention_rows_bytes(a, masked));
}

// Attention received: the sums over queries, from base, inverse and floor, in scratch memory laid out as AttentionRows.
const char* sum_over_queries(const AttentionArgs& a, void* scratch, Stream stream);
const char* masked_sum_over_queries(const AttentionArgs& a, void* scratch, Stream stream);

}  // namespace diffrate::cuda
