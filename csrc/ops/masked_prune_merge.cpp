#include <cmath>
#include <string>

#include "cuda/kernels.h"
#include "ops/device.h"

namespace diffrate::ops {
namespace {

// Number `index` of a wide CPU tensor.
double number_at(const Tensor& tensor, int64_t index) {
  if (tensor.scalar_type() == ScalarType::Double) return static_cast<const double*>(tensor.const_data_ptr())[index];
  return static_cast<double>(static_cast<const float*>(tensor.const_data_ptr())[index]);
}

const void* kept_number(const Tensor& kept, const Tensor& x, const char* name) {
  check_same_device(kept, x, name);
  DIFFRATE_CHECK(kept.dim() == 0 && kept.scalar_type() == wide_type(x), name,
                 " must be a 0-d tensor, float32, or float64 beside float64 features");
  return kept.const_data_ptr();
}

int64_t read_kept_number(const Tensor& kept, int64_t tokens, const char* name) {
  double number = number_at(kept, 0);
  DIFFRATE_CHECK(number >= 0, name, " must be at least 0, got ", number);
  return number < static_cast<double>(tokens) ? std::llround(number) : tokens;
}

// Reads the numbers of tokens on the host, and refuses those that make no sense.
void read_numbers(MaskedPruneMergeArgs& args, const Tensor& mask, const Tensor& kept_p, const Tensor& kept_m) {
  args.k_p = read_kept_number(kept_p, args.tokens, "kept_p");
  args.k_m = read_kept_number(kept_m, args.tokens, "kept_m");
  double alive = 0;  // in the first image, as in every other
  for (int64_t j = 0; args.images > 0 && j < args.tokens; ++j) alive += number_at(mask, j * args.mask.stride_token);
  DIFFRATE_CHECK(alive >= 0 && alive <= static_cast<double>(args.tokens), "mask must lie in 0 .. 1");
  args.last = std::llround(alive);
  int64_t middle = args.k_p < args.last ? args.k_p : args.last;
  DIFFRATE_CHECK(args.images == 0 || args.k_m >= middle || args.k_m > args.prefix, "kept_m = ", args.k_m,
                 " leaves no token to merge into: prefix = ", args.prefix);
  DIFFRATE_CHECK(args.images == 0 || middle >= args.prefix, "kept_p = ", args.k_p, " is less than the prefix, ",
                 args.prefix);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_prune_merge(Tensor x, Tensor mask, Tensor importance,
                                                                      std::optional<Tensor> size, Tensor prune_prob,
                                                                      Tensor merge_prob, Tensor kept_p, Tensor kept_m,
                                                                      int64_t prefix, std::string sizes) {
  check_tokens(x, prefix);
  DIFFRATE_CHECK(importance.dim() == 2, "importance must be (B, N - prefix)");
  DIFFRATE_CHECK(sizes == "cosine" || sizes == "sum", "sizes must be 'cosine' or 'sum', got '", sizes, "'");
  int64_t images = x.size(0), tokens = x.size(1), channels = x.size(2);
  check_same_device(prune_prob, x, "prune_prob");
  check_same_device(merge_prob, x, "merge_prob");
  // the probabilities matter to the gradient alone
  check_shape(prune_prob, {tokens}, "prune_prob");
  check_shape(merge_prob, {tokens}, "merge_prob");
  x = with_unit_last_stride(x);
  Tensor out = empty_like(x, {images, tokens, channels}, x.scalar_type());
  Tensor out_mask = empty_like(x, {images, tokens}, wide_type(x));
  Tensor out_size = empty_like(x, {images, tokens}, wide_type(x));
  Tensor order = empty_like(x, {images, tokens}, ScalarType::Long);
  Tensor dst = empty_like(x, {images, tokens}, ScalarType::Long);
  MaskedPruneMergeArgs args{};
  args.type = type_of(x, "x");
  args.images = images;
  args.tokens = tokens;
  args.channels = channels;
  args.prefix = prefix;
  args.kept_p_on_device = kept_number(kept_p, x, "kept_p");
  args.kept_m_on_device = kept_number(kept_m, x, "kept_m");
  args.x = tokens_of(x);
  args.importance = importance_of(importance, x, prefix, false);
  args.mask = vector_of(mask, x, tokens, "mask");
  args.size = vector_of(size, x, tokens, "size");
  args.cosine_sizes = sizes == "cosine";
  args.out = out.mutable_data_ptr();
  args.out_mask = out_mask.mutable_data_ptr();
  args.out_size = out_size.mutable_data_ptr();
  args.order = static_cast<int64_t*>(order.mutable_data_ptr());
  args.dst = static_cast<int64_t*>(dst.mutable_data_ptr());
  run_on_device(
      x,
      [&](const cpu::Kernels& kernels, const cpu::Threads& pool) {
        read_numbers(args, mask, kept_p, kept_m);
        kernels.masked_prune_merge(args, pool);
      },
      [&](void* stream) {
        Tensor scratch = empty_like(x, {cuda::masked_prune_merge_scratch_bytes(args)}, ScalarType::Byte);
        return cuda::masked_prune_merge(args, scratch.mutable_data_ptr(), stream);
      });
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
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
  library.impl("masked_prune_merge", TORCH_BOX(&masked_prune_merge));
}

}  // namespace diffrate::ops
