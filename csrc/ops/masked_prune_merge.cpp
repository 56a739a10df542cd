#include <cmath>
#include <string>

#include "ops/common.h"

namespace diffrate::ops {
namespace {

// Number `index` of a wide CPU tensor.
double number_at(const Tensor& tensor, int64_t index) {
  if (tensor.scalar_type() == ScalarType::Double) return static_cast<const double*>(tensor.const_data_ptr())[index];
  return static_cast<double>(static_cast<const float*>(tensor.const_data_ptr())[index]);
}

int64_t kept_number(const Tensor& kept, const Tensor& x, int64_t tokens, const char* name) {
  check_same_device(kept, x, name);
  DIFFRATE_CHECK(kept.dim() == 0 && kept.scalar_type() == wide_type(x), name,
                 " must be a 0-d tensor, float32, or float64 beside float64 features");
  double number = number_at(kept, 0);
  DIFFRATE_CHECK(number >= 0, name, " must be at least 0, got ", number);
  return number < static_cast<double>(tokens) ? std::llround(number) : tokens;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_prune_merge(Tensor x, Tensor mask, Tensor importance,
                                                                      std::optional<Tensor> size, Tensor prune_prob,
                                                                      Tensor merge_prob, Tensor kept_p, Tensor kept_m,
                                                                      int64_t prefix, std::string sizes) {
  check_tokens(x, prefix);
  DIFFRATE_CHECK(importance.dim() == 2, "importance must be (B, N - prefix)");
  DIFFRATE_CHECK(sizes == "cosine" || sizes == "sum", "sizes must be 'cosine' or 'sum', got '", sizes, "'");
  int64_t images = x.size(0), tokens = x.size(1), channels = x.size(2);
  // the probabilities matter to the gradient alone
  check_shape(prune_prob, {tokens}, "prune_prob");
  check_shape(merge_prob, {tokens}, "merge_prob");
  x = with_unit_last_stride(x);
  Vector masks = vector_of(mask, x, tokens, "mask");
  int64_t pruned = kept_number(kept_p, x, tokens, "kept_p"), merged = kept_number(kept_m, x, tokens, "kept_m");

  double alive = 0;  // in the first image, as in every other
  for (int64_t j = 0; images > 0 && j < tokens; ++j) alive += number_at(mask, j * masks.stride_token);
  DIFFRATE_CHECK(alive >= 0 && alive <= static_cast<double>(tokens), "mask must lie in 0 .. 1");
  int64_t last = std::llround(alive), middle = pruned < last ? pruned : last;
  DIFFRATE_CHECK(images == 0 || merged >= middle || merged > prefix, "kept_m = ", merged,
                 " leaves no token to merge into: prefix = ", prefix);
  DIFFRATE_CHECK(images == 0 || middle >= prefix, "kept_p = ", pruned, " is less than the prefix, ", prefix);

  Tensor out = empty_like(x, {images, tokens, channels}, x.scalar_type());
  Tensor out_mask = empty_like(x, {images, tokens}, wide_type(x));
  Tensor out_size = empty_like(x, {images, tokens}, wide_type(x));
  Tensor order = empty_like(x, {images, tokens}, ScalarType::Long);
  Tensor dst = empty_like(x, {images, tokens}, ScalarType::Long);
  MaskedPruneMergeArgs args{type_of(x, "x"),
                            images,
                            tokens,
                            channels,
                            prefix,
                            last,
                            pruned,
                            merged,
                            tokens_of(x),
                            importance_of(importance, x, prefix, false),
                            masks,
                            vector_of(size, x, tokens, "size"),
                            sizes == "cosine",
                            out.mutable_data_ptr(),
                            out_mask.mutable_data_ptr(),
                            out_size.mutable_data_ptr(),
                            static_cast<int64_t*>(order.mutable_data_ptr()),
                            static_cast<int64_t*>(dst.mutable_data_ptr())};
  cpu::kernels().masked_prune_merge(args, threads());
  return {out, out_mask, out_size, order, dst};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def(
      "masked_prune_merge(Tensor x, Tensor mask, Tensor importance, Tensor? size, Tensor prune_prob, Tensor "
      "merge_prob, "
      "Tensor kept_p, Tensor kept_m, int prefix=1, str sizes='cosine') -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
  library.impl("masked_prune_merge", TORCH_BOX(&masked_prune_merge));
}

}  // namespace diffrate::ops
