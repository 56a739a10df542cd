// What this library was built with and runs with, and what it cannot do; read by diffrate_ext._C.
#pragma once

#include <cstdint>

namespace diffrate {

struct BuildInfo {
  const char* compiler;
  const char* simd_levels;  // space separated
  const char* simd_in_use;
  const char* cuda_architectures;  // space separated; empty without CUDA kernels
  const char* abi_target;
  const char* torch_version;  // whose headers served
};

#define DIFFRATE_EXPORT __attribute__((visibility("default")))
DIFFRATE_EXPORT BuildInfo build_info();
DIFFRATE_EXPORT int64_t most_head_channels(bool float64);
#undef DIFFRATE_EXPORT

}  // namespace diffrate
