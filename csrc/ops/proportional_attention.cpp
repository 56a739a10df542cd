#include <string>

#include "ops/attention.h"

namespace diffrate::ops {
namespace {

std::tuple<Tensor, Tensor> proportional_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> size,
                                                  double scale, int64_t prefix, std::string importance) {
  DIFFRATE_CHECK(importance == "class" || importance == "received" || importance == "none",
                 "importance must be 'class', 'received' or 'none', got '", importance, "'");
  MaskedAttentionArgs args = attention_inputs(q, k, v, size, scale, prefix);
  bool measures = importance != "none";
  Tensor out = empty_heads(q);
  Tensor measured = empty_like(q, {args.images, measures ? args.tokens - prefix : 0}, wide_type(q));
  args.received = importance == "received";
  args.out = out.mutable_data_ptr();
  args.importance = measures ? measured.mutable_data_ptr() : nullptr;
  run_on_device(
      q,
      [](const cpu::Kernels&, const cpu::Threads&) {
        DIFFRATE_CHECK(false, "proportional_attention has no CPU kernel: torch's fused attention serves there");
      },
      [&](void* stream) {
        Tensor scratch = empty_bytes(q, cuda::proportional_attention_scratch_bytes(args));
        return cuda::proportional_attention(args, scratch.mutable_data_ptr(), stream);
      });
  return {out, measured};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def(
      "proportional_attention(Tensor q, Tensor k, Tensor v, Tensor? size, float scale, int prefix=1, "
      "str importance='class') -> (Tensor, Tensor)");
}
#if defined(DIFFRATE_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
#endif
  library.impl("proportional_attention", TORCH_BOX(&proportional_attention));
}

}  // namespace diffrate::ops
