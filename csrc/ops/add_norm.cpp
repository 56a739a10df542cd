#include "ops/layer_norm.h"
#include "ops/run.h"

namespace diffrate::ops {
namespace {

std::tuple<Tensor, Tensor> add_norm(Tensor x, Tensor residual, Tensor norm_weight, std::optional<Tensor> norm_bias,
                                    double norm_eps) {
  DIFFRATE_CHECK(x.dim() == 3, "x must be (B, N, C)");
  int64_t images = x.size(0), tokens = x.size(1), channels = x.size(2);
  check_same_device(residual, x, "residual");
  check_shape(residual, {images, tokens, channels}, "residual");
  DIFFRATE_CHECK(residual.scalar_type() == x.scalar_type(), "residual must have the dtype of x");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  if (!residual.is_contiguous()) residual = torch::stable::contiguous(residual);
  Tensor sum = empty_like(x, {images, tokens, channels}, x.scalar_type());
  Tensor normalized = empty_like(x, {images, tokens, channels}, x.scalar_type());
  Norm norm{.weight = norm_weight, .bias = norm_bias, .eps = norm_eps};
  run::add_norm(x, {.type = type_of(x, "x"),
                    .rows = channels > 0 ? images * tokens : 0,
                    .channels = channels,
                    .x = x.const_data_ptr(),
                    .residual = residual.const_data_ptr(),
                    .out = sum.mutable_data_ptr(),
                    .norm = norm.arguments(x, normalized)});
  return {sum, normalized};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def(
      "add_norm(Tensor x, Tensor residual, Tensor norm_weight, Tensor? norm_bias, float norm_eps) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) { library.impl("add_norm", TORCH_BOX(&add_norm)); }
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) { library.impl("add_norm", TORCH_BOX(&add_norm)); }

}  // namespace diffrate::ops
