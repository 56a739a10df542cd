// From a dtype to the C++ type that a kernel is compiled for.
#pragma once

#include "common/arguments.h"
#include "cpu/simd.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

// Calls body(T{}) with the C++ type of a dtype.
template <class Body>
void dispatch(Type type, Body body) {
  switch (type) {
    case Type::f32: return body(float{});
    case Type::f64: return body(double{});
    case Type::f16: return body(Half{});
    case Type::bf16: return body(BFloat16{});
  }
}

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
