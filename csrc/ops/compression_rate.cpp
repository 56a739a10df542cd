#include "ops/run.h"

namespace diffrate::ops {
namespace {

CompressionRateArgs inputs(Tensor& logits, int64_t patches, int64_t granularity, int64_t prefix) {
  DIFFRATE_CHECK(logits.dim() == 2, "logits must be (L, K)");
  DIFFRATE_CHECK(logits.scalar_type() == ScalarType::Float || logits.scalar_type() == ScalarType::Double,
                 "logits must be float32 or float64");
  DIFFRATE_CHECK(patches > 0 && granularity > 0 && prefix >= 0,
                 "n_patches and granularity must be positive, prefix at least 0");
  int64_t candidates = (patches - 1) / granularity + 1;
  DIFFRATE_CHECK(logits.size(1) == candidates, "logits must have one column for each of the ", candidates,
                 " candidates, got ", logits.size(1));
  logits = torch::stable::contiguous(logits);
  CompressionRateArgs args{};
  args.type = type_of(logits, "logits");
  args.proxies = logits.size(0);
  args.candidates = candidates;
  args.patches = patches;
  args.granularity = granularity;
  args.prefix = prefix;
  args.logits = logits.const_data_ptr();
  return args;
}

std::tuple<Tensor, Tensor> compression_rate(Tensor logits, int64_t n_patches, int64_t granularity, int64_t prefix) {
  CompressionRateArgs args = inputs(logits, n_patches, granularity, prefix);
  Tensor kept = empty_like(logits, {args.proxies}, logits.scalar_type());
  Tensor keep_prob = empty_like(logits, {args.proxies, n_patches + prefix}, logits.scalar_type());
  args.kept = kept.mutable_data_ptr();
  args.keep_prob = keep_prob.mutable_data_ptr();
  run::compression_rate(logits, args);
  return {kept, keep_prob};
}

Tensor compression_rate_backward(Tensor grad_kept, Tensor grad_keep_prob, Tensor logits, int64_t n_patches,
                                 int64_t granularity, int64_t prefix) {
  CompressionRateArgs args = inputs(logits, n_patches, granularity, prefix);
  check_same_device(grad_kept, logits, "grad_kept");
  check_same_device(grad_keep_prob, logits, "grad_keep_prob");
  check_shape(grad_kept, {args.proxies}, "grad_kept");
  check_shape(grad_keep_prob, {args.proxies, n_patches + prefix}, "grad_keep_prob");
  DIFFRATE_CHECK(
      grad_kept.scalar_type() == logits.scalar_type() && grad_keep_prob.scalar_type() == logits.scalar_type(),
      "gradients must have the dtype of logits");
  grad_kept = torch::stable::contiguous(grad_kept);
  grad_keep_prob = torch::stable::contiguous(grad_keep_prob);
  Tensor grad = empty_like(logits, {args.proxies, args.candidates}, logits.scalar_type());
  args.grad_kept = grad_kept.const_data_ptr();
  args.grad_keep_prob = grad_keep_prob.const_data_ptr();
  args.grad_logits = grad.mutable_data_ptr();
  run::compression_rate_backward(logits, args);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def("compression_rate(Tensor logits, int n_patches, int granularity=1, int prefix=1) -> (Tensor, Tensor)");
  library.def(
      "compression_rate_backward(Tensor grad_kept, Tensor grad_keep_prob, Tensor logits, int n_patches, "
      "int granularity, int prefix) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
  library.impl("compression_rate", TORCH_BOX(&compression_rate));
  library.impl("compression_rate_backward", TORCH_BOX(&compression_rate_backward));
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
  library.impl("compression_rate", TORCH_BOX(&compression_rate));
  library.impl("compression_rate_backward", TORCH_BOX(&compression_rate_backward));
}

}  // namespace diffrate::ops
