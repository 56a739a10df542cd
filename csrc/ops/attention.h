// What class_attention and received_attention share.
#pragma once

#include "ops/common.h"

namespace diffrate::ops {

inline Tensor attention_importance(Tensor q, Tensor k, const std::optional<Tensor>& size, double scale, int64_t prefix,
                                   void (*cpu::Kernels::*kernel)(const AttentionArgs&, const cpu::Threads&)) {
  DIFFRATE_CHECK(q.dim() == 4, "q must be (B, H, N, D)");
  int64_t images = q.size(0), heads = q.size(1), tokens = q.size(2), head_dim = q.size(3);
  check_same_device(k, q, "k");
  check_shape(k, {images, heads, tokens, head_dim}, "k");
  DIFFRATE_CHECK(k.scalar_type() == q.scalar_type(), "k must have the dtype of q");
  DIFFRATE_CHECK(heads > 0 && tokens > 0, "q has no heads or no tokens");
  DIFFRATE_CHECK(prefix >= 0 && prefix <= tokens, "prefix must be between 0 and the number of tokens");
  q = with_unit_last_stride(q);
  k = with_unit_last_stride(k);
  Tensor importance = empty_like(q, {images, tokens - prefix}, wide_type(q));
  AttentionArgs args{type_of(q, "q"),
                     images,
                     heads,
                     tokens,
                     head_dim,
                     prefix,
                     q.const_data_ptr(),
                     q.stride(0),
                     q.stride(1),
                     q.stride(2),
                     k.const_data_ptr(),
                     k.stride(0),
                     k.stride(1),
                     k.stride(2),
                     vector_of(size, q, tokens, "size"),
                     scale,
                     importance.mutable_data_ptr()};
  (cpu::kernels().*kernel)(args, threads());
  return importance;
}

}  // namespace diffrate::ops
