#include "ops/build.h"

#include "common/limits.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

#if defined(__clang__)
#define DIFFRATE_COMPILER "clang " __clang_version__
#else
#define DIFFRATE_COMPILER "gcc " __VERSION__
#endif

namespace diffrate {

static_assert(TORCH_TARGET_VERSION == 0x020a000000000000ULL);

BuildInfo build_info() {
  return {.compiler = DIFFRATE_COMPILER,
          .simd_levels = DIFFRATE_SIMD_LEVELS,
          .simd_in_use = cpu::kernels().name,
          .cuda_architectures = cuda::registered_kernels ? cuda::registered_kernels->architectures : "",
          .abi_target = "2.10",
          .torch_version = DIFFRATE_TORCH_VERSION};
}

int64_t most_head_channels(bool float64) { return most_head_channels(float64 ? Type::f64 : Type::f32); }

}  // namespace diffrate
