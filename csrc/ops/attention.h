// What the attention operators share.
#pragma once

#include "ops/run.h"

namespace diffrate::ops {

inline Heads heads_of(const Tensor& tensor) {
  return {.data = tensor.const_data_ptr(),
          .stride_image = tensor.stride(0),
          .stride_head = tensor.stride(1),
          .stride_token = tensor.stride(2)};
}

inline void check_like_q(const Tensor& tensor, const Tensor& q, const char* name) {
  check_same_device(tensor, q, name);
  check_shape(tensor, {q.size(0), q.size(1), q.size(2), q.size(3)}, name);
  DIFFRATE_CHECK(tensor.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
}

inline void check_queries(const Tensor& q, int64_t prefix) {
  DIFFRATE_CHECK(q.dim() == 4, "q must be (B, H, N, D)");
  DIFFRATE_CHECK(q.size(1) > 0 && q.size(2) > 0 && q.size(3) > 0, "q has no heads, no tokens or no channels");
  DIFFRATE_CHECK(prefix >= 0 && prefix <= q.size(2), "prefix must be between 0 and the number of tokens");
}

// (B, H, N, D) over (B, N, H, D) memory, so that the transpose before a projection is free.
inline Tensor empty_heads(const Tensor& q) {
  int64_t heads = q.size(1), tokens = q.size(2), channels = q.size(3);
  const int64_t strides[4] = {tokens * heads * channels, channels, heads * channels, 1};
  return empty_strided(q, {q.size(0), heads, tokens, channels}, strides, q.scalar_type());
}

// Checks the arguments that all attention operators have; v may be null. Replaces q, k and v by copies where their last
// stride is not 1.
inline AttentionArgs attention_inputs(Tensor& q, Tensor& k, Tensor* v, const std::optional<Tensor>& size, double scale,
                                      int64_t prefix) {
  check_queries(q, prefix);
  check_like_q(k, q, "k");
  if (v != nullptr) check_like_q(*v, q, "v");
  q = with_unit_last_stride(q);
  k = with_unit_last_stride(k);
  if (v != nullptr) *v = with_unit_last_stride(*v);
  AttentionArgs args{};
  args.type = type_of(q, "q");
  args.images = q.size(0);
  args.heads = q.size(1);
  args.tokens = q.size(2);
  args.head_dim = q.size(3);
  args.prefix = prefix;
  args.q = heads_of(q);
  args.k = heads_of(k);
  if (v != nullptr) args.v = heads_of(*v);
  args.size = vector_of(size, q, args.tokens, "size");
  args.scale = scale;
  return args;
}

// class_attention and received_attention.
inline Tensor attention_importance(void (*run)(const Tensor&, const AttentionArgs&), Tensor q, Tensor k,
                                   const std::optional<Tensor>& size, double scale, int64_t prefix) {
  AttentionArgs args = attention_inputs(q, k, nullptr, size, scale, prefix);
  Tensor importance = empty_like(q, {args.images, args.tokens - prefix}, wide_type(q));
  args.importance = importance.mutable_data_ptr();
  run(q, args);
  return importance;
}

}  // namespace diffrate::ops
