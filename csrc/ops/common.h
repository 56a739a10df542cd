// What the operators share: argument checks, dtypes, and the way from a tensor to a kernel argument.
//
// Torch is met only through its stable C++ ABI. Python checks every argument first, with ValueError and TypeError; the
// checks here keep callers of torch.ops.diffrate.* from reading or writing out of bounds.
#pragma once

#include <optional>
#include <string>

#include "common/arguments.h"
#include "cpu/kernels.h"
#include "torch/csrc/stable/library.h"
#include "torch/csrc/stable/ops.h"
#include "torch/csrc/stable/tensor.h"
#include "torch/headeronly/core/ScalarType.h"
#include "torch/headeronly/util/Exception.h"

namespace diffrate::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define DIFFRATE_CHECK(condition, ...) STD_TORCH_CHECK(condition, "diffrate: ", __VA_ARGS__)

inline Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: DIFFRATE_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
  }
  return Type::f32;  // not reached
}

// The dtype of importances and sizes beside features of this dtype.
inline ScalarType wide_type(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_same_device(const Tensor& tensor, const Tensor& like, const char* name) {
  DIFFRATE_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu() &&
                     tensor.get_device_index() == like.get_device_index(),
                 name, " is on another device than the first argument");
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dimension = 0;
  for (int64_t extent : shape) same = same && tensor.size(dimension++) == extent;
  DIFFRATE_CHECK(same, name, " has an unexpected shape");
}

inline Tensor with_unit_last_stride(const Tensor& tensor) {
  int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Tokens tokens_of(const Tensor& tensor) {
  return {.data = tensor.const_data_ptr(), .stride_image = tensor.stride(0), .stride_token = tensor.stride(1)};
}

// An optional wide vector (B, N).
inline Vector vector_of(const std::optional<Tensor>& tensor, const Tensor& features, int64_t tokens, const char* name) {
  if (!tensor) return {};
  check_same_device(*tensor, features, name);
  check_shape(*tensor, {features.size(0), tokens}, name);
  DIFFRATE_CHECK(tensor->scalar_type() == wide_type(features), name,
                 " must be float32, or float64 beside float64 features");
  return {.data = tensor->const_data_ptr(), .stride_image = tensor->stride(0), .stride_token = tensor->stride(1)};
}

// Attention (B, H, N, N), its class rows (B, H, N), or importance (B, N) or (B, N-P), as a mean over heads and queries.
inline Importance importance_of(const Tensor& attn, const Tensor& x, int64_t prefix, bool received) {
  check_same_device(attn, x, "attn");
  int64_t images = x.size(0), tokens = x.size(1);
  Importance from{.data = attn.const_data_ptr(),
                  .type = type_of(attn, "attn"),
                  .heads = 1,
                  .queries = 1,
                  .stride_image = attn.stride(0),
                  .stride_head = 0,
                  .stride_query = 0,
                  .stride_token = attn.stride(attn.dim() - 1)};
  int64_t skipped = prefix;  // columns before the first patch
  if (attn.dim() == 2) {
    DIFFRATE_CHECK(attn.size(0) == images && (attn.size(1) == tokens || attn.size(1) == tokens - prefix),
                   "importance must be (B, N) or (B, N - prefix)");
    skipped = attn.size(1) - (tokens - prefix);
  } else {
    from.heads = attn.size(1);
    from.stride_head = attn.stride(1);
    if (attn.dim() == 3) {
      check_shape(attn, {images, from.heads, tokens}, "attn");
    } else {
      check_shape(attn, {images, from.heads, tokens, tokens}, "attn");
      from.queries = received ? tokens : 1;
      from.stride_query = attn.stride(2);
    }
    DIFFRATE_CHECK(from.heads > 0, "attn has no heads");
  }
  int64_t item = from.type == Type::f64 ? 8 : from.type == Type::f32 ? 4 : 2;
  from.data = static_cast<const char*>(from.data) + skipped * from.stride_token * item;
  return from;
}

// Whether an argument is the second of the two values that it may have.
inline bool is_second(const std::string& value, const char* first, const char* second, const char* name) {
  DIFFRATE_CHECK(value == first || value == second, name, " must be '", first, "' or '", second, "', got '", value,
                 "'");
  return value == second;
}

inline void check_tokens(const Tensor& x, int64_t prefix) {
  DIFFRATE_CHECK(x.dim() == 3, "x must be (B, N, C)");
  DIFFRATE_CHECK(x.size(1) < INT32_MAX, "x has too many tokens");
  DIFFRATE_CHECK(prefix >= 0 && prefix <= x.size(1), "prefix must be between 0 and the number of tokens");
}

// On the device of `like`. Not by torch's new_empty, which goes through the dispatcher.
inline Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> shape, const int64_t* strides,
                            ScalarType type) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device_type, like.get_device_index(), &result));
  return Tensor(result);
}

// Contiguous, of at most four dimensions.
inline Tensor empty_like(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  int64_t strides[4], stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape.begin()[i] > 0 ? shape.begin()[i] : 1;
  }
  return empty_strided(like, shape, strides, type);
}

}  // namespace diffrate::ops
