#include "ops/attention.h"

namespace diffrate::ops {
namespace {

Tensor class_attention(Tensor q, Tensor k, std::optional<Tensor> size, double scale, int64_t prefix) {
  return attention_importance(run::class_attention, q, k, size, scale, prefix);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def("class_attention(Tensor q, Tensor k, Tensor? size, float scale, int prefix=1) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) { library.impl("class_attention", TORCH_BOX(&class_attention)); }
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) { library.impl("class_attention", TORCH_BOX(&class_attention)); }

}  // namespace diffrate::ops
