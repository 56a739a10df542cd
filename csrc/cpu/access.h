// How kernels read tokens and sizes.
#pragma once

#include "cpu/kernels.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

template <class T>
const T* row_of(const Tokens& tokens, int64_t image, int64_t token) {
  return static_cast<const T*>(tokens.data) + image * tokens.stride_image + token * tokens.stride_token;
}

template <class W>
W size_of(const Vector& size, int64_t image, int64_t token) {
  if (!size.data) return 1;
  return static_cast<const W*>(size.data)[image * size.stride_image + token * size.stride_token];
}

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
