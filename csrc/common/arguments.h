// What the kernels take: raw pointers, sizes, strides. One plain struct per operator, shared by CPU and CUDA.
//
// All strides are in elements. `Type` is the dtype of the features (x, out, grad, q, k, v); importances, sizes and
// masks are `wide`: float, or double beside double features. Pointers are into the memory of the device that runs the
// kernel.
#pragma once

#include <cstdint>

#include "common/numeric.h"

namespace diffrate {

enum class Type { f32, f64, f16, bf16 };

// Importance (B, N-P) as a mean over heads and queries of attention. Importance that is given is the mean over one head
// and one query.
struct Importance {
  const void* data;  // at the first patch of image 0
  Type type;
  int64_t heads, queries;
  int64_t stride_image, stride_head, stride_query, stride_token;
};

struct Tokens {  // (B, N, C) with a unit last stride
  const void* data;
  int64_t stride_image, stride_token;
};

struct Vector {  // (B, N), wide
  const void* data;
  int64_t stride_image, stride_token;
};

struct Heads {  // (B, H, N, D) with a unit last stride
  const void* data;
  int64_t stride_image, stride_head, stride_token;
};

struct SortArgs {
  Type type;
  int64_t images, tokens, channels, prefix;
  Tokens x;
  Importance importance;
  Vector size;  // data may be null: all ones
  void* out;    // (B, N, C), contiguous like everything that is written
  void* out_size;
  int64_t* order;
};

// Layer normalization of rows that are written: (x - mean) / sqrt(variance + eps) * weight + bias, in wide numbers.
struct LayerNorm {
  const void* weight;  // (C), of the features' dtype like the bias
  const void* bias;    // (C), or null: zeros
  double eps;
  void* out;  // as large as the rows; null: not wanted
};

struct AddNormArgs {  // all contiguous
  Type type;
  int64_t rows, channels;
  const void *x, *residual;
  void* out;       // their sum
  LayerNorm norm;  // of `out`
};

struct PruneMergeArgs {
  Type type;
  int64_t images, tokens, channels, prefix, k_p, k_m;
  Tokens x;
  Tokens residual;  // data may be null
  Importance importance;
  Vector size;         // data may be null: all ones
  bool weighted_mean;  // features: size-weighted instead of plain mean
  bool cosine_sizes;   // sizes grow by size * cosine instead of size
  void* out;           // (B, k_m, C)
  void* out_size;      // (B, k_m)
  int64_t* slot;       // (B, N)
  LayerNorm norm;      // of `out`
};

struct MaskedPruneMergeArgs {
  Type type;
  int64_t images, tokens, channels, prefix;
  const void *kept_p, *kept_m;  // one number each, wide: common/kept_numbers.h says what follows from them and the mask
  Tokens x;
  Importance importance;
  Vector mask;
  Vector size;        // data may be null: all ones
  bool cosine_sizes;  // a source adds size * cosine instead of size; at least 1 in either case
  void* out;          // (B, N, C)
  void* out_mask;     // (B, N)
  void* out_size;     // (B, N)
  int64_t* order;     // (B, N)
  int64_t* dst;       // (B, N)
};

// The tokens that stay alive are written as if the others were dropped; what is masked follows after them. How many
// these are (k_p, k_m) is for the kernel to find out.
DIFFRATE_INLINE PruneMergeArgs alive_part(const MaskedPruneMergeArgs& a) {
  return {.type = a.type,
          .images = a.images,
          .tokens = a.tokens,
          .channels = a.channels,
          .prefix = a.prefix,
          .k_p = a.tokens,
          .k_m = a.tokens,
          .x = a.x,
          .residual = {},
          .importance = a.importance,
          .size = a.size,
          .weighted_mean = false,
          .cosine_sizes = a.cosine_sizes,
          .out = a.out,
          .out_size = nullptr,
          .slot = nullptr,
          .norm = {}};
}

struct MaskedPruneMergeBackwardArgs {
  Type type;  // of grad_out; without one, that of the mask
  int64_t images, tokens, channels, prefix;
  const void *kept_p, *kept_m;  // these and the mask as given to the forward pass, order and dst as it wrote them
  Vector mask;
  const int64_t *order, *dst;               // (B, N), contiguous
  Tokens grad_out;                          // of x in the results
  Vector grad_out_mask;                     // of the mask in the results
  void* grad_x;                             // (B, N, C); may be null: not wanted, and grad_out not read
  void* grad_mask;                          // (B, N)
  void *grad_prune_prob, *grad_merge_prob;  // (N); may be null: not wanted, nor grad_mask, and grad_out_mask not read
};

// What `order` or `dst` says of a position; the position itself where that is no token, so that a caller of the
// operator who hands over nonsense stays in bounds.
DIFFRATE_INLINE int64_t token_at(const int64_t* positions, const MaskedPruneMergeBackwardArgs& a, int64_t image,
                                 int64_t j) {
  int64_t token = positions[image * a.tokens + j];
  return token >= 0 && token < a.tokens ? token : j;
}

struct MergeReduceArgs {  // forward: x (B, N, C) -> out (B, kept, C); backward: x (B, kept, C) -> out (B, N, C)
  Type type;
  int64_t images, tokens, kept, channels;
  Tokens x;
  Tokens residual;     // like x, added to it on the way in; data may be null, and is in the backward pass
  const int64_t* dst;  // (B, N), in [-1, kept)
  int64_t dst_stride_image, dst_stride_token;
  Vector weights;  // data may be null: all ones
  void* out;
};

struct BipartiteMatchArgs {
  Type type;
  int64_t images, heads, tokens, head_dim, prefix, merged;
  Heads keys;     // tokens are compared by the mean over heads, rounded to the keys' dtype
  int64_t* slot;  // (B, N): common/bipartition.h says what is written
};

// Of all attention kernels: each uses what it needs. Everything written is contiguous; what is as large as q is
// (B, N, H, D).
struct AttentionArgs {
  Type type;
  int64_t images, heads, tokens, head_dim, prefix;
  Heads q, k;
  Heads v;      // not used by class_attention and received_attention
  Vector mask;  // masked_attention and its gradients alone
  Vector size;  // data may be null: all ones
  double scale;
  bool received;     // where there is v: importance is the attention received, not the class token's
  bool by_head;      // of proportional_attention: importance is the rows of the class token (B, H, N), not their mean
  void* out;         // (B, N, H, D)
  void* importance;  // (B, N-P); with v it may be null on CUDA: not wanted
  Heads grad;        // of out; masked_attention_backward alone uses this and what follows
  void *grad_q, *grad_k, *grad_v;
  void* grad_mask;  // (B, N)
  bool difference;  // grad_mask is what would change if a masked token were there, not the derivative where it is not
};

struct CompressionRateArgs {  // L proxies over K candidates; all arrays contiguous, of one type
  Type type;                  // f32 or f64
  int64_t proxies, candidates, patches, granularity, prefix;
  const void* logits;     // (L, K)
  void* kept;             // (L)
  void* keep_prob;        // (L, N)
  const void* grad_kept;  // of the results; the backward pass alone uses these
  const void* grad_keep_prob;
  void* grad_logits;  // (L, K)
};

}  // namespace diffrate
