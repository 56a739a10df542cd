// Registers the CUDA kernels. A build without them leaves this file out.
#include "cuda/kernels.h"

namespace diffrate::cuda {

#define DIFFRATE_DECLARE(kernel, Args) const char* kernel(const Args&, const Scratch&, void* stream);
DIFFRATE_KERNELS(DIFFRATE_DECLARE, DIFFRATE_DECLARE)

namespace {

#define DIFFRATE_ENTRY(kernel, Args) .kernel = kernel,
constexpr Kernels kTable = {.architectures = DIFFRATE_CUDA_ARCHITECTURES,
                            DIFFRATE_KERNELS(DIFFRATE_ENTRY, DIFFRATE_ENTRY)};

[[maybe_unused]] const bool kRegistered = [] {
  registered_kernels = &kTable;
  return true;
}();

}  // namespace
}  // namespace diffrate::cuda
