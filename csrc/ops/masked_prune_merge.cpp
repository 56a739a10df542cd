#include "common/kept_numbers.h"
#include "ops/run.h"

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

// Refuses kept numbers that make no sense. Only on the CPU: elsewhere looking at them would stop the stream.
void check_numbers(const MaskedPruneMergeArgs& args, const Tensor& mask, const Tensor& kept_p, const Tensor& kept_m) {
  const double number_p = number_at(kept_p, 0), number_m = number_at(kept_m, 0);
  DIFFRATE_CHECK(number_p >= 0, "kept_p must be at least 0, got ", number_p);
  DIFFRATE_CHECK(number_m >= 0, "kept_m must be at least 0, got ", number_m);
  if (args.images == 0) return;
  double alive = 0;
  for (int64_t j = 0; j < args.tokens; ++j) alive += number_at(mask, j * args.mask.stride_token);
  DIFFRATE_CHECK(alive >= 0 && alive <= static_cast<double>(args.tokens), "mask must lie in 0 .. 1");
  const int64_t last = whole_number_of_tokens(alive, args.tokens), k_p = whole_number_of_tokens(number_p, args.tokens),
                k_m = whole_number_of_tokens(number_m, args.tokens), middle = k_p < last ? k_p : last;
  DIFFRATE_CHECK(k_m >= middle || k_m > args.prefix, "kept_m = ", k_m,
                 " leaves no token to merge into: prefix = ", args.prefix);
  DIFFRATE_CHECK(middle >= args.prefix, "kept_p = ", k_p, " is less than the prefix, ", args.prefix);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_prune_merge(Tensor x, Tensor mask, Tensor importance,
                                                                      std::optional<Tensor> size, Tensor prune_prob,
                                                                      Tensor merge_prob, Tensor kept_p, Tensor kept_m,
                                                                      int64_t prefix, std::string size_rule) {
  check_tokens(x, prefix);
  DIFFRATE_CHECK(importance.dim() == 2, "importance must be (B, N - prefix)");
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
  MaskedPruneMergeArgs args{.type = type_of(x, "x"),
                            .images = images,
                            .tokens = tokens,
                            .channels = channels,
                            .prefix = prefix,
                            .kept_p = kept_number(kept_p, x, "kept_p"),
                            .kept_m = kept_number(kept_m, x, "kept_m"),
                            .x = tokens_of(x),
                            .importance = importance_of(importance, x, prefix, false),
                            .mask = vector_of(mask, x, tokens, "mask"),
                            .size = vector_of(size, x, tokens, "size"),
                            .cosine_sizes = is_second(size_rule, "sum", "cosine", "size_rule"),
                            .out = out.mutable_data_ptr(),
                            .out_mask = out_mask.mutable_data_ptr(),
                            .out_size = out_size.mutable_data_ptr(),
                            .order = static_cast<int64_t*>(order.mutable_data_ptr()),
                            .dst = static_cast<int64_t*>(dst.mutable_data_ptr())};
  if (runs_on_cpu(x)) check_numbers(args, mask, kept_p, kept_m);
  run::masked_prune_merge(x, args);
  return {out, out_mask, out_size, order, dst};
}

Tensor positions(const Tensor& tensor, const Tensor& mask, const char* name) {
  check_same_device(tensor, mask, name);
  check_shape(tensor, {mask.size(0), mask.size(1)}, name);
  DIFFRATE_CHECK(tensor.scalar_type() == ScalarType::Long, name, " must be int64");
  return torch::stable::contiguous(tensor);
}

// Of x, mask, prune_prob and merge_prob. Without grad_out the first is empty, without grad_out_mask the others.
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_prune_merge_backward(std::optional<Tensor> grad_out,
                                                                       std::optional<Tensor> grad_out_mask, Tensor mask,
                                                                       Tensor order, Tensor dst, Tensor kept_p,
                                                                       Tensor kept_m, int64_t prefix) {
  const bool with_x = grad_out.has_value(), with_mask = grad_out_mask.has_value();
  DIFFRATE_CHECK(mask.dim() == 2, "mask must be (B, N)");
  DIFFRATE_CHECK(!with_x || grad_out->dim() == 3, "grad_out must be (B, N, C)");
  int64_t images = mask.size(0), tokens = mask.size(1), channels = with_x ? grad_out->size(2) : 0;
  DIFFRATE_CHECK(tokens < INT32_MAX, "there are too many tokens");
  DIFFRATE_CHECK(prefix >= 0 && prefix <= tokens, "prefix must be between 0 and the number of tokens");
  if (with_x) check_shape(*grad_out, {images, tokens, channels}, "grad_out");
  Tensor features = with_x ? with_unit_last_stride(*grad_out) : mask;
  order = positions(order, mask, "order");
  dst = positions(dst, mask, "dst");
  ScalarType wide = wide_type(features);
  auto wanted = [&](bool given, std::initializer_list<int64_t> shape, ScalarType type) {
    return given ? empty_like(features, shape, type) : empty_like(features, {0}, type);
  };
  Tensor grad_x = wanted(with_x, {images, tokens, channels}, features.scalar_type());
  Tensor grad_mask = wanted(with_mask, {images, tokens}, wide);
  Tensor grad_prune_prob = wanted(with_mask, {tokens}, wide), grad_merge_prob = wanted(with_mask, {tokens}, wide);
  run::masked_prune_merge_backward(features,
                                   {.type = type_of(features, "grad_out"),
                                    .images = images,
                                    .tokens = tokens,
                                    .channels = channels,
                                    .prefix = prefix,
                                    .kept_p = kept_number(kept_p, features, "kept_p"),
                                    .kept_m = kept_number(kept_m, features, "kept_m"),
                                    .mask = vector_of(mask, features, tokens, "mask"),
                                    .order = static_cast<const int64_t*>(order.const_data_ptr()),
                                    .dst = static_cast<const int64_t*>(dst.const_data_ptr()),
                                    .grad_out = with_x ? tokens_of(features) : Tokens{},
                                    .grad_out_mask = vector_of(grad_out_mask, features, tokens, "grad_out_mask"),
                                    .grad_x = with_x ? grad_x.mutable_data_ptr() : nullptr,
                                    .grad_mask = with_mask ? grad_mask.mutable_data_ptr() : nullptr,
                                    .grad_prune_prob = with_mask ? grad_prune_prob.mutable_data_ptr() : nullptr,
                                    .grad_merge_prob = with_mask ? grad_merge_prob.mutable_data_ptr() : nullptr});
  return {grad_x, grad_mask, grad_prune_prob, grad_merge_prob};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def(
      "masked_prune_merge(Tensor x, Tensor mask, Tensor importance, Tensor? size, Tensor prune_prob, "
      "Tensor merge_prob, Tensor kept_p, Tensor kept_m, int prefix=1, str size_rule='cosine') "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "masked_prune_merge_backward(Tensor? grad_out, Tensor? grad_out_mask, Tensor mask, Tensor order, Tensor dst, "
      "Tensor kept_p, Tensor kept_m, int prefix) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) {
  library.impl("masked_prune_merge", TORCH_BOX(&masked_prune_merge));
  library.impl("masked_prune_merge_backward", TORCH_BOX(&masked_prune_merge_backward));
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) {
  library.impl("masked_prune_merge", TORCH_BOX(&masked_prune_merge));
  library.impl("masked_prune_merge_backward", TORCH_BOX(&masked_prune_merge_backward));
}

}  // namespace diffrate::ops
