#include "ops/attention.h"

namespace diffrate::ops {
namespace {

AttentionArgs inputs(Tensor& q, Tensor& k, Tensor& v, const Tensor& mask, const std::optional<Tensor>& size,
                     double scale, int64_t prefix) {
  AttentionArgs args = attention_inputs(q, k, &v, size, scale, prefix);
  args.mask = vector_of(mask, q, args.tokens, "mask");
  return args;
}

std::tuple<Tensor, Tensor> masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, std::optional<Tensor> size,
                                            double scale, int64_t prefix, std::string importance_from,
                                            std::string mask_gradient) {
  const bool received = is_second(importance_from, "class", "received", "importance_from");
  is_second(mask_gradient, "derivative", "difference", "mask_gradient");  // for the backward pass
  AttentionArgs args = inputs(q, k, v, mask, size, scale, prefix);
  args.received = received;
  Tensor out = empty_heads(q);
  Tensor importance = empty_like(q, {args.images, args.tokens - prefix}, wide_type(q));
  args.out = out.mutable_data_ptr();
  args.importance = importance.mutable_data_ptr();
  run::masked_attention(q, args);
  return {out, importance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                                     Tensor mask, std::optional<Tensor> size,
                                                                     double scale, std::string mask_gradient) {
  AttentionArgs args = inputs(q, k, v, mask, size, scale, 0);
  check_like_q(grad, q, "grad");
  grad = with_unit_last_stride(grad);
  args.grad = heads_of(grad);
  args.difference = is_second(mask_gradient, "derivative", "difference", "mask_gradient");
  Tensor grad_q = empty_heads(q), grad_k = empty_heads(q), grad_v = empty_heads(q);
  Tensor grad_mask = empty_like(q, {args.images, args.tokens}, wide_type(q));
  args.grad_q = grad_q.mutable_data_ptr();
  args.grad_k = grad_k.mutable_data_ptr();
  args.grad_v = grad_v.mutable_data_ptr();
  args.grad_mask = grad_mask.mutable_data_ptr();
  run::masked_attention_backward(q, args);
  return {grad_q, grad_k, grad_v, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def(
      "masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? size, float scale, int prefix=1, "
      "str importance_from='class', str mask_gradient='derivative') -> (Tensor, Tensor)");
  library.def(
      "masked_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? size, float scale, "
      "str mask_gradient='derivative') -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
  library.impl("masked_attention", TORCH_BOX(&masked_attention));
  library.impl("masked_attention_backward", TORCH_BOX(&masked_attention_backward));
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
  library.impl("masked_attention", TORCH_BOX(&masked_attention));
  library.impl("masked_attention_backward", TORCH_BOX(&masked_attention_backward));
}

}  // namespace diffrate::ops
