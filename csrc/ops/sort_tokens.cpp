#include "ops/run.h"

namespace diffrate::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor> sort_tokens(Tensor x, Tensor importance, std::optional<Tensor> size,
                                               int64_t prefix) {
  check_tokens(x, prefix);
  DIFFRATE_CHECK(importance.dim() == 2, "importance must be (B, N) or (B, N - prefix)");
  x = with_unit_last_stride(x);
  int64_t images = x.size(0), tokens = x.size(1), channels = x.size(2);
  Tensor out = empty_like(x, {images, tokens, channels}, x.scalar_type());
  Tensor out_size = empty_like(x, {images, tokens}, wide_type(x));
  Tensor order = empty_like(x, {images, tokens}, ScalarType::Long);
  run::sort_tokens(x, {.type = type_of(x, "x"),
                       .images = images,
                       .tokens = tokens,
                       .channels = channels,
                       .prefix = prefix,
                       .x = tokens_of(x),
                       .importance = importance_of(importance, x, prefix, false),
                       .size = vector_of(size, x, tokens, "size"),
                       .out = out.mutable_data_ptr(),
                       .out_size = out_size.mutable_data_ptr(),
                       .order = static_cast<int64_t*>(order.mutable_data_ptr())});
  return {out, out_size, order};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def("sort_tokens(Tensor x, Tensor importance, Tensor? size=None, int prefix=1) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) { library.impl("sort_tokens", TORCH_BOX(&sort_tokens)); }
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) { library.impl("sort_tokens", TORCH_BOX(&sort_tokens)); }

}  // namespace diffrate::ops
