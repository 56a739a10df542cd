// What the attention operators share.
#pragma once

#include "cuda/kernels.h"
#include "ops/device.h"

namespace diffrate::ops {

inline Heads heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
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
  Tensor memory = empty_like(q, {q.size(0), q.size(2), q.size(1), q.size(3)}, q.scalar_type());
  return torch::stable::transpose(memory, 1, 2);
}

inline Tensor empty_bytes(const Tensor& like, int64_t count) { return empty_like(like, {count}, ScalarType::Byte); }

// Checks the arguments that all operators with values have. Replaces q, k and v by copies where their last stride is
// not 1.
inline MaskedAttentionArgs attention_inputs(Tensor& q, Tensor& k, Tensor& v, const std::optional<Tensor>& size,
                                            double scale, int64_t prefix) {
  check_queries(q, prefix);
  check_like_q(k, q, "k");
  check_like_q(v, q, "v");
  q = with_unit_last_stride(q);
  k = with_unit_last_stride(k);
  v = with_unit_last_stride(v);
  MaskedAttentionArgs args{};
  args.type = type_of(q, "q");
  args.images = q.size(0);
  args.heads = q.size(1);
  args.tokens = q.size(2);
  args.head_dim = q.size(3);
  args.prefix = prefix;
  args.q = heads_of(q);
  args.k = heads_of(k);
  args.v = heads_of(v);
  args.size = vector_of(size, q, args.tokens, "size");
  args.scale = scale;
  return args;
}

using ImportanceOnCpu = void (*cpu::Kernels::*)(const AttentionArgs&, const cpu::Threads&);
using ImportanceOnCuda = const char* (*)(const AttentionArgs&, void* scratch, void* stream);

// class_attention and received_attention.
inline Tensor attention_importance(Tensor q, Tensor k, const std::optional<Tensor>& size, double scale, int64_t prefix,
                                   ImportanceOnCpu on_cpu, ImportanceOnCuda on_cuda,
                                   int64_t (*scratch_bytes)(const AttentionArgs&)) {
  check_queries(q, prefix);
  check_like_q(k, q, "k");
  q = with_unit_last_stride(q);
  k = with_unit_last_stride(k);
  int64_t images = q.size(0), heads = q.size(1), tokens = q.size(2), head_dim = q.size(3);
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
  run_on_device(
      q, [&](const cpu::Kernels& kernels, const cpu::Threads& pool) { (kernels.*on_cpu)(args, pool); },
      [&](void* stream) {
        Tensor scratch = empty_bytes(q, scratch_bytes(args));
        return on_cuda(args, scratch.mutable_data_ptr(), stream);
      });
  return importance;
}

}  // namespace diffrate::ops
