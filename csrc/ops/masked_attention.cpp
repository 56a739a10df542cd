#include <string>

#include "ops/common.h"

namespace diffrate::ops {
namespace {

Heads heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_like_q(const Tensor& tensor, const Tensor& q, const char* name) {
  check_same_device(tensor, q, name);
  check_shape(tensor, {q.size(0), q.size(1), q.size(2), q.size(3)}, name);
  DIFFRATE_CHECK(tensor.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
}

// (B, H, N, D) over (B, N, H, D) memory, so that the transpose before a projection is free.
Tensor empty_heads(const Tensor& q) {
  Tensor memory = empty_like(q, {q.size(0), q.size(2), q.size(1), q.size(3)}, q.scalar_type());
  return torch::stable::transpose(memory, 1, 2);
}

// The arguments of both passes. Replaces q, k and v by copies where their last stride is not 1.
MaskedAttentionArgs inputs(Tensor& q, Tensor& k, Tensor& v, const Tensor& mask, const std::optional<Tensor>& size,
                           double scale, int64_t prefix) {
  DIFFRATE_CHECK(q.dim() == 4, "q must be (B, H, N, D)");
  check_like_q(k, q, "k");
  check_like_q(v, q, "v");
  int64_t tokens = q.size(2);
  DIFFRATE_CHECK(q.size(1) > 0 && tokens > 0 && q.size(3) > 0, "q has no heads, no tokens or no channels");
  DIFFRATE_CHECK(prefix >= 0 && prefix <= tokens, "prefix must be between 0 and the number of tokens");
  q = with_unit_last_stride(q);
  k = with_unit_last_stride(k);
  v = with_unit_last_stride(v);
  MaskedAttentionArgs args{};
  args.type = type_of(q, "q");
  args.images = q.size(0);
  args.heads = q.size(1);
  args.tokens = tokens;
  args.head_dim = q.size(3);
  args.prefix = prefix;
  args.q = heads_of(q);
  args.k = heads_of(k);
  args.v = heads_of(v);
  args.mask = vector_of(mask, q, tokens, "mask");
  args.size = vector_of(size, q, tokens, "size");
  args.scale = scale;
  return args;
}

std::tuple<Tensor, Tensor> masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, std::optional<Tensor> size,
                                            double scale, int64_t prefix, std::string importance) {
  DIFFRATE_CHECK(importance == "class" || importance == "received", "importance must be 'class' or 'received', got '",
                 importance, "'");
  MaskedAttentionArgs args = inputs(q, k, v, mask, size, scale, prefix);
  args.received = importance == "received";
  Tensor out = empty_heads(q);
  Tensor measured = empty_like(q, {args.images, args.tokens - prefix}, wide_type(q));
  args.out = out.mutable_data_ptr();
  args.importance = measured.mutable_data_ptr();
  cpu::kernels().masked_attention(args, threads());
  return {out, measured};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                                     Tensor mask, std::optional<Tensor> size,
                                                                     double scale) {
  MaskedAttentionArgs args = inputs(q, k, v, mask, size, scale, 0);
  check_like_q(grad, q, "grad");
  grad = with_unit_last_stride(grad);
  args.grad = heads_of(grad);
  Tensor grad_q = empty_heads(q), grad_k = empty_heads(q), grad_v = empty_heads(q);
  Tensor grad_mask = empty_like(q, {args.images, args.tokens}, wide_type(q));
  args.grad_q = grad_q.mutable_data_ptr();
  args.grad_k = grad_k.mutable_data_ptr();
  args.grad_v = grad_v.mutable_data_ptr();
  args.grad_mask = grad_mask.mutable_data_ptr();
  cpu::kernels().masked_attention_backward(args, threads());
  return {grad_q, grad_k, grad_v, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def(
      "masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? size, float scale, int prefix=1, "
      "str importance='class') -> (Tensor, Tensor)");
  library.def(
      "masked_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? size, float scale) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
  library.impl("masked_attention", TORCH_BOX(&masked_attention));
  library.impl("masked_attention_backward", TORCH_BOX(&masked_attention_backward));
}

}  // namespace diffrate::ops
