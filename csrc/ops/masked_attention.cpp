#include <string>

#include "ops/attention.h"

namespace diffrate::ops {
namespace {

MaskedAttentionArgs inputs(Tensor& q, Tensor& k, Tensor& v, const Tensor& mask, const std::optional<Tensor>& size,
                           double scale, int64_t prefix) {
  MaskedAttentionArgs args = attention_inputs(q, k, v, size, scale, prefix);
  args.mask = vector_of(mask, q, args.tokens, "mask");
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
  run_on_device(
      q, [&](const cpu::Kernels& kernels, const cpu::Threads& pool) { kernels.masked_attention(args, pool); },
      [&](void* stream) {
        Tensor scratch = empty_bytes(q, cuda::masked_attention_scratch_bytes(args));
        return cuda::masked_attention(args, scratch.mutable_data_ptr(), stream);
      });
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
  run_on_device(
      q, [&](const cpu::Kernels& kernels, const cpu::Threads& pool) { kernels.masked_attention_backward(args, pool); },
      [&](void* stream) {
        Tensor scratch = empty_bytes(q, cuda::masked_attention_backward_scratch_bytes(args));
        return cuda::masked_attention_backward(args, scratch.mutable_data_ptr(), stream);
      });
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
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
  library.impl("masked_attention", TORCH_BOX(&masked_attention));
  library.impl("masked_attention_backward", TORCH_BOX(&masked_attention_backward));
}

}  // namespace diffrate::ops
