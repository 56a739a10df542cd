// CUDA only: on the CPU torch's fused attention is used.
#include "ops/attention.h"

namespace diffrate::ops {
namespace {

std::tuple<Tensor, Tensor> proportional_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> size,
                                                  double scale, int64_t prefix, std::string importance_from) {
  const bool by_head = importance_from == "class_rows", received = importance_from == "received";
  const bool wanted = importance_from != "none";
  DIFFRATE_CHECK(by_head || received || !wanted || importance_from == "class",
                 "importance_from must be 'class', 'class_rows', 'received' or 'none', got '", importance_from, "'");
  AttentionArgs args = attention_inputs(q, k, &v, size, scale, prefix);
  Tensor out = empty_heads(q);
  Tensor importance = by_head ? empty_like(q, {args.images, args.heads, args.tokens}, wide_type(q))
                              : empty_like(q, {args.images, wanted ? args.tokens - prefix : 0}, wide_type(q));
  args.received = received;
  args.by_head = by_head;
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
