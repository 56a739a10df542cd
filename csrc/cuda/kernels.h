// The CUDA kernels: one table of entry points, where this build has any.
#pragma once

#include "common/kernels.h"

namespace diffrate::cuda {

// Where a kernel gets device memory for intermediate results. It asks once; the memory is its own until its work on the
// stream is done.
struct Scratch {
  void* (*allocate)(void* context, int64_t bytes);
  void* context;

  void* take(int64_t bytes) const { return allocate(context, bytes); }
};

// Launches on `stream` of the current device. Returns nullptr, or what went wrong.
template <class Args>
using Kernel = const char* (*)(const Args&, const Scratch&, void* stream);

struct Kernels {
  const char* architectures;  // that they were compiled for, such as "80-real 90"
#define DIFFRATE_MEMBER(kernel, Args) Kernel<Args> kernel;
  DIFFRATE_KERNELS(DIFFRATE_MEMBER, DIFFRATE_MEMBER)
#undef DIFFRATE_MEMBER
};

// Set by table.cpp, which only a build with CUDA kernels compiles, when the library is loaded.
inline constinit const Kernels* registered_kernels = nullptr;

}  // namespace diffrate::cuda
