#include "ops/layer_norm.h"
#include "ops/run.h"

namespace diffrate::ops {
namespace {

struct Merged {
  Tensor x, size, slot;
  std::optional<Tensor> normalized;  // with a norm alone
};

Merged merged(Tensor x, const Tensor& attn, int64_t k_p, int64_t k_m, const std::optional<Tensor>& size, int64_t prefix,
              const std::string& importance_from, const std::string& mean_rule, const std::string& size_rule,
              std::optional<Tensor> residual, std::optional<Norm> norm) {
  check_tokens(x, prefix);
  DIFFRATE_CHECK(attn.dim() >= 2 && attn.dim() <= 4, "attn must be (B, H, N, N), (B, H, N), (B, N) or (B, N - prefix)");
  x = with_unit_last_stride(x);
  int64_t images = x.size(0), tokens = x.size(1), channels = x.size(2);
  DIFFRATE_CHECK(k_p <= tokens && ((prefix + 1 <= k_m && k_m < k_p) || (prefix <= k_m && k_m == k_p)),
                 "kept numbers must satisfy prefix + 1 <= k_m < k_p <= N or prefix <= k_m = k_p <= N");
  Tokens residual_tokens{};
  if (residual) {
    check_same_device(*residual, x, "residual");
    check_shape(*residual, {images, tokens, channels}, "residual");
    DIFFRATE_CHECK(residual->scalar_type() == x.scalar_type(), "residual must have the dtype of x");
    residual = with_unit_last_stride(*residual);
    residual_tokens = tokens_of(*residual);
  }
  Tensor out = empty_like(x, {images, k_m, channels}, x.scalar_type());
  Tensor out_size = empty_like(x, {images, k_m}, wide_type(x));
  Tensor slot = empty_like(x, {images, tokens}, ScalarType::Long);
  LayerNorm layer_norm{};
  std::optional<Tensor> normalized;
  if (norm) {
    normalized = empty_like(x, {images, k_m, channels}, x.scalar_type());
    layer_norm = norm->arguments(x, *normalized);
  }
  const bool received = is_second(importance_from, "class", "received", "importance_from");
  run::prune_merge(x, {.type = type_of(x, "x"),
                       .images = images,
                       .tokens = tokens,
                       .channels = channels,
                       .prefix = prefix,
                       .k_p = k_p,
                       .k_m = k_m,
                       .x = tokens_of(x),
                       .residual = residual_tokens,
                       .importance = importance_of(attn, x, prefix, received),
                       .size = vector_of(size, x, tokens, "size"),
                       .weighted_mean = is_second(mean_rule, "mean", "weighted", "mean_rule"),
                       .cosine_sizes = is_second(size_rule, "sum", "cosine", "size_rule"),
                       .out = out.mutable_data_ptr(),
                       .out_size = out_size.mutable_data_ptr(),
                       .slot = static_cast<int64_t*>(slot.mutable_data_ptr()),
                       .norm = layer_norm});
  return {out, out_size, slot, normalized};
}

std::tuple<Tensor, Tensor, Tensor> prune_merge(Tensor x, Tensor attn, int64_t k_p, int64_t k_m,
                                               std::optional<Tensor> size, int64_t prefix, std::string importance_from,
                                               std::string mean_rule, std::string size_rule,
                                               std::optional<Tensor> residual) {
  Merged found = merged(x, attn, k_p, k_m, size, prefix, importance_from, mean_rule, size_rule, residual, {});
  return {found.x, found.size, found.slot};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_merge_norm(Tensor x, Tensor attn, int64_t k_p, int64_t k_m,
                                                            Tensor norm_weight, std::optional<Tensor> norm_bias,
                                                            double norm_eps, std::optional<Tensor> size, int64_t prefix,
                                                            std::string importance_from, std::string mean_rule,
                                                            std::string size_rule, std::optional<Tensor> residual) {
  Merged found = merged(x, attn, k_p, k_m, size, prefix, importance_from, mean_rule, size_rule, residual,
                        Norm{.weight = norm_weight, .bias = norm_bias, .eps = norm_eps});
  return {found.x, found.size, found.slot, *found.normalized};
}

}  // namespace

// SymInt: one compiled graph serves blocks that keep other numbers.
STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def(
      "prune_merge(Tensor x, Tensor attn, SymInt k_p, SymInt k_m, Tensor? size=None, int prefix=1, "
      "str importance_from='class', str mean_rule='mean', str size_rule='cosine', Tensor? residual=None) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "prune_merge_norm(Tensor x, Tensor attn, SymInt k_p, SymInt k_m, Tensor norm_weight, Tensor? norm_bias, "
      "float norm_eps, Tensor? size=None, int prefix=1, str importance_from='class', str mean_rule='mean', "
      "str size_rule='cosine', Tensor? residual=None) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
  library.impl("prune_merge", TORCH_BOX(&prune_merge));
  library.impl("prune_merge_norm", TORCH_BOX(&prune_merge_norm));
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
  library.impl("prune_merge", TORCH_BOX(&prune_merge));
  library.impl("prune_merge_norm", TORCH_BOX(&prune_merge_norm));
}

}  // namespace diffrate::ops
