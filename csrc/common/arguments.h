// What the kernels take: raw pointers, sizes, strides. One plain struct per operator, shared by CPU and CUDA.
//
// All strides are in elements. `Type` is the dtype of the features (x, out, grad, q, k, v); importances, sizes and
// masks are `wide`: float, or double beside double features.
#pragma once

#include <cstdint>

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

struct PruneMergeArgs {
  Type type;
  int64_t images, tokens, channels, prefix, k_p, k_m;
  Tokens x;
  Tokens residual;  // data may be null
  Importance importance;
  Vector size;        // data may be null: all ones
  bool weighted;      // features: size-weighted instead of plain mean
  bool cosine_sizes;  // sizes grow by size * cosine instead of size
  void* out;          // (B, k_m, C)
  void* out_size;     // (B, k_m)
  int64_t* slot;      // (B, N)
};

struct MergeReduceArgs {  // forward: x (B, N, C) -> out (B, kept, C); backward: x (B, kept, C) -> out (B, N, C)
  Type type;
  int64_t images, tokens, kept, channels;
  Tokens x;
  const int64_t* dst;  // (B, N), in [-1, kept)
  int64_t dst_stride_image, dst_stride_token;
  Vector weights;  // data may be null: all ones
  void* out;
};

struct AttentionArgs {  // importance (B, N-P) from q, k (B, H, N, D) with a unit last stride
  Type type;
  int64_t images, heads, tokens, head_dim, prefix;
  const void* q;
  int64_t q_stride_image, q_stride_head, q_stride_token;
  const void* k;
  int64_t k_stride_image, k_stride_head, k_stride_token;
  Vector size;  // data may be null: all ones
  double scale;
  void* importance;
};

struct Heads {  // (B, H, N, D) with a unit last stride
  const void* data;
  int64_t stride_image, stride_head, stride_token;
};

struct MaskedAttentionArgs {  // everything written is (B, N, H, D), contiguous, but for importance and grad_mask
  Type type;
  int64_t images, heads, tokens, head_dim, prefix;
  Heads q, k, v;
  Vector mask;
  Vector size;  // data may be null: all ones
  double scale;
  bool received;  // importance: attention received by each patch instead of the class token's
  void* out;
  void* importance;  // (B, N-P); null: not wanted (CUDA only)
  Heads grad;        // of out; the backward pass alone uses this and what follows
  void *grad_q, *grad_k, *grad_v;
  void* grad_mask;  // (B, N)
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

struct MaskedPruneMergeArgs {
  Type type;
  int64_t images, tokens, channels, prefix;
  int64_t last;      // tokens alive before: pruning masks sorted positions k_p .. last-1, if any
  int64_t k_p, k_m;  // merging takes positions k_m .. min(last, k_p)-1 as sources, if any
  const void *kept_p_on_device, *kept_m_on_device;  // wide; the CUDA kernel reads these and the mask instead
  Tokens x;
  Importance importance;
  Vector mask;
  Vector size;        // data may be null: all ones
  bool cosine_sizes;  // a source counts size * cosine, at least 1, instead of size
  void* out;          // (B, N, C)
  void* out_mask;     // (B, N)
  void* out_size;     // (B, N)
  int64_t* order;     // (B, N)
  int64_t* dst;       // (B, N)
};

}  // namespace diffrate
