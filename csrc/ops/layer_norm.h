// The layer normalization that an operator is given, (weight, bias, eps).
#pragma once

#include <limits>

#include "ops/common.h"

namespace diffrate::ops {

// A weight or a bias, (C). It may be replaced by a copy, which must outlive the call.
inline const void* per_channel(Tensor& tensor, const Tensor& x, const char* name) {
  check_same_device(tensor, x, name);
  check_shape(tensor, {x.size(2)}, name);
  DIFFRATE_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  tensor = with_unit_last_stride(tensor);
  return tensor.const_data_ptr();
}

struct Norm {
  Tensor weight;
  std::optional<Tensor> bias;
  double eps;

  // For features x, (B, N, C). The norm must outlive what is returned.
  LayerNorm arguments(const Tensor& x, Tensor& out) {
    DIFFRATE_CHECK(eps >= 0 && eps <= std::numeric_limits<double>::max(),
                   "norm_eps must be finite and at least 0, got ", eps);
    return {.weight = per_channel(weight, x, "norm_weight"),
            .bias = bias ? per_channel(*bias, x, "norm_bias") : nullptr,
            .eps = eps,
            .out = out.mutable_data_ptr()};
  }
};

}  // namespace diffrate::ops
