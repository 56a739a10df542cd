// The CUDA kernels, emulated, in place of the CPU kernels: the tests of the CPU kernels then test them.
#include <cstdio>
#include <cstdlib>

#include "testing/cuda_kernels.h"
#include "testing/kernel_cases.h"

namespace diffrate::cpu {
namespace {

template <class Args, cuda::Kernel<Args> cuda::Kernels::* kKernel>
void run(const Args& args, const Threads&) {
  const char* error = testing::run_cuda(kKernel, args);
  if (error == nullptr) return;
  std::printf("FAILED: launch: %s\n", error);
  std::exit(1);
}

#define DIFFRATE_ENTRY(kernel, Args) .kernel = run<Args, &cuda::Kernels::kernel>,
const Kernels kEmulated = {.name = testing::kEmulatedKernels, DIFFRATE_KERNELS(DIFFRATE_ENTRY, DIFFRATE_ENTRY)};

}  // namespace

const Kernels& kernels() { return kEmulated; }

}  // namespace diffrate::cpu
