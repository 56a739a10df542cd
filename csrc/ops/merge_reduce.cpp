#include "ops/run.h"

namespace diffrate::ops {
namespace {

// Forward reads x (B, N, C) and writes (B, kept, C); backward reads the gradient (B, kept, C) and writes (B, N, C).
Tensor reduce(Tensor x, Tensor dst, int64_t kept, const std::optional<Tensor>& weights, std::optional<Tensor> residual,
              bool backward) {
  DIFFRATE_CHECK(x.dim() == 3, "x must be (B, N, C)");
  DIFFRATE_CHECK(dst.dim() == 2 && dst.size(0) == x.size(0), "dst must be (B, N)");
  DIFFRATE_CHECK(dst.scalar_type() == ScalarType::Long, "dst must be int64");
  DIFFRATE_CHECK(kept >= 0, "kept must not be negative");
  check_same_device(dst, x, "dst");
  x = with_unit_last_stride(x);
  int64_t images = x.size(0), tokens = dst.size(1), channels = x.size(2);
  DIFFRATE_CHECK(tokens < INT32_MAX && kept < INT32_MAX, "there are too many tokens");
  check_shape(x, {images, backward ? kept : tokens, channels}, backward ? "grad" : "x");
  if (residual) {
    check_same_device(*residual, x, "residual");
    check_shape(*residual, {images, tokens, channels}, "residual");
    DIFFRATE_CHECK(residual->scalar_type() == x.scalar_type(), "residual must have the dtype of x");
    residual = with_unit_last_stride(*residual);
  }
  Tensor out = empty_like(x, {images, backward ? tokens : kept, channels}, x.scalar_type());
  MergeReduceArgs args{.type = type_of(x, "x"),
                       .images = images,
                       .tokens = tokens,
                       .kept = kept,
                       .channels = channels,
                       .x = tokens_of(x),
                       .residual = residual ? tokens_of(*residual) : Tokens{},
                       .dst = static_cast<const int64_t*>(dst.const_data_ptr()),
                       .dst_stride_image = dst.stride(0),
                       .dst_stride_token = dst.stride(1),
                       .weights = vector_of(weights, x, tokens, "weights"),
                       .out = out.mutable_data_ptr()};
  if (backward)
    run::merge_reduce_backward(x, args);
  else
    run::merge_reduce(x, args);
  return out;
}

Tensor merge_reduce(Tensor x, Tensor dst, int64_t kept, std::optional<Tensor> weights, std::optional<Tensor> residual) {
  return reduce(x, dst, kept, weights, residual, false);
}

Tensor merge_reduce_backward(Tensor grad, Tensor dst, std::optional<Tensor> weights) {
  DIFFRATE_CHECK(grad.dim() == 3, "grad must be (B, kept, C)");
  return reduce(grad, dst, grad.size(1), weights, {}, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def("merge_reduce(Tensor x, Tensor dst, SymInt kept, Tensor? weights=None, Tensor? residual=None) -> Tensor");
  library.def("merge_reduce_backward(Tensor grad, Tensor dst, Tensor? weights=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
  library.impl("merge_reduce", TORCH_BOX(&merge_reduce));
  library.impl("merge_reduce_backward", TORCH_BOX(&merge_reduce_backward));
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
  library.impl("merge_reduce", TORCH_BOX(&merge_reduce));
  library.impl("merge_reduce_backward", TORCH_BOX(&merge_reduce_backward));
}

}  // namespace diffrate::ops
