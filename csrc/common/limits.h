// What the kernels cannot do.
#pragma once

#include "common/arguments.h"

namespace diffrate {

// The most channels that a head may have on CUDA, but for class_attention, which takes any number. The CPU takes any.
constexpr int64_t most_head_channels(Type type) { return type == Type::f64 ? 64 : 128; }

}  // namespace diffrate
