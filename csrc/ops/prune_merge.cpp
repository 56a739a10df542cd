#include <string>

#include "cuda/kernels.h"
#include "ops/device.h"

namespace diffrate::ops {
namespace {

bool is_second(const std::string& value, const char* first, const char* second, const char* name) {
  DIFFRATE_CHECK(value == first || value == second, name, " must be '", first, "' or '", second, "', got '", value,
                 "'");
  return value == second;
}

std::tuple<Tensor, Tensor, Tensor> prune_merge(Tensor x, Tensor attn, int64_t k_p, int64_t k_m,
                                               std::optional<Tensor> size, int64_t prefix, std::string importance,
                                               std::string features, std::string sizes,
                                               std::optional<Tensor> residual) {
  check_tokens(x, prefix);
  DIFFRATE_CHECK(attn.dim() >= 2 && attn.dim() <= 4, "attn must be (B, H, N, N), (B, H, N), (B, N) or (B, N - prefix)");
  x = with_unit_last_stride(x);
  int64_t images = x.size(0), tokens = x.size(1), channels = x.size(2);
  DIFFRATE_CHECK(k_p <= tokens && ((prefix + 1 <= k_m && k_m < k_p) || (prefix <= k_m && k_m == k_p)),
                 "kept numbers must satisfy prefix + 1 <= k_m < k_p <= N or prefix <= k_m = k_p <= N");
  Tokens residual_tokens{nullptr, 0, 0};
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
  PruneMergeArgs args{type_of(x, "x"),
                      images,
                      tokens,
                      channels,
                      prefix,
                      k_p,
                      k_m,
                      tokens_of(x),
                      residual_tokens,
                      importance_of(attn, x, prefix, is_second(importance, "class", "received", "importance")),
                      vector_of(size, x, tokens, "size"),
                      is_second(features, "mean", "weighted", "features"),
                      is_second(sizes, "sum", "cosine", "sizes"),
                      out.mutable_data_ptr(),
                      out_size.mutable_data_ptr(),
                      static_cast<int64_t*>(slot.mutable_data_ptr())};
  run_on_device(
      x, [&](const cpu::Kernels& kernels, const cpu::Threads& pool) { kernels.prune_merge(args, pool); },
      [&](void* stream) {
        Tensor scratch = empty_like(x, {cuda::prune_merge_scratch_bytes(args)}, ScalarType::Byte);
        return cuda::prune_merge(args, scratch.mutable_data_ptr(), stream);
      });
  return {out, out_size, slot};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def(
      "prune_merge(Tensor x, Tensor attn, int k_p, int k_m, Tensor? size=None, int prefix=1, str importance='class', "
      "str features='mean', str sizes='cosine', Tensor? residual=None) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) { library.impl("prune_merge", TORCH_BOX(&prune_merge)); }
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) { library.impl("prune_merge", TORCH_BOX(&prune_merge)); }

}  // namespace diffrate::ops
