// What this library was built with and runs with; read by diffrate_ext._C.
#pragma once

namespace diffrate {

struct BuildInfo {
  const char* compiler;
  const char* simd_levels;  // space separated
  const char* simd_in_use;
  const char* cuda_architectures;  // empty without CUDA kernels
  const char* abi_target;
  const char* torch_version;  // whose headers served
};

__attribute__((visibility("default"))) BuildInfo build_info();

}  // namespace diffrate
