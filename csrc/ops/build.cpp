#include "ops/build.h"

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
  return {DIFFRATE_COMPILER,     DIFFRATE_SIMD_LEVELS, cpu::kernels().name, cuda::architectures(), "2.10",
          DIFFRATE_TORCH_VERSION};
}

}  // namespace diffrate
