// CUDA only: on the CPU torch's fused attention is used.
#include "ops/attention.h"

namespace diffrate::ops {
namespace {

std::tuple<Tensor, Tensor> proportional_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> size,
                                                  double scale, int64_t prefix, std::string importance_from) {
  DIFFRATE_CHECK(importance_from == "class" || importance_from == "received" || importance_from == "none",
                 "importance_from must be 'class', 'received' or 'none', got '", importance_from, "'");
  AttentionArgs args = attention_inputs(q, k, &v, size, scale, prefix);
  bool wanted = importance_from != "none";
  Tensor out = empty_heads(q);
  Tensor importance = empty_like(q, {args.images, wanted ? args.tokens - prefix : 0}, wide_type(q));
  args.received = importance_from == "received";
  args.out = out.mutable_data_ptr();
  args.importance = wanted ? importance.mutable_data_ptr() : nullptr;
  run::proportional_attention(q, args);
  return {out, importance};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def(
      "proportional_attention(Tensor q, Tensor k, Tensor v, Tensor? size, float scale, int prefix=1, "
      "str importance_from='class') -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
  library.impl("proportional_attention", TORCH_BOX(&proportional_attention));
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
  library.impl("proportional_attention", TORCH_BOX(&proportional_attention));
}

}  // namespace diffrate::ops
