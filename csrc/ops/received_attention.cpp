#include "ops/attention.h"

namespace diffrate::ops {
namespace {

Tensor received_attention(Tensor q, Tensor k, std::optional<Tensor> size, double scale, int64_t prefix) {
  return attention_importance(run::received_attention, q, k, size, scale, prefix);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def("received_attention(Tensor q, Tensor k, Tensor? size, float scale, int prefix=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
  library.impl("received_attention", TORCH_BOX(&received_attention));
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
  library.impl("received_attention", TORCH_BOX(&received_attention));
}

}  // namespace diffrate::ops
