// Runs a CUDA kernel on the emulated device.
#pragma once

#include <memory>

#include "cuda/kernels.h"
#include "testing/checks.h"

namespace diffrate::testing {

// Scratch memory exactly as long as a kernel asks for, filled with NaN.
struct ExactScratch {
  std::unique_ptr<unsigned char[]> memory;

  operator cuda::Scratch() {
    auto allocate = [](void* context, int64_t bytes) -> void* {
      auto* own = static_cast<ExactScratch*>(context);
      check(own->memory == nullptr, "a kernel asks for scratch memory once");
      own->memory = exact<unsigned char>(bytes, 0xff);
      return own->memory.get();
    };
    return {.allocate = allocate, .context = this};
  }
};

// Returns what the kernel does: nullptr, or what went wrong.
template <class Args>
const char* run_cuda(cuda::Kernel<Args> cuda::Kernels::* kernel, const Args& args) {
  ExactScratch scratch;
  return (cuda::registered_kernels->*kernel)(args, scratch, nullptr);
}

}  // namespace diffrate::testing
