// The CPU kernels: one table of entry points for each instruction set they were compiled for.
#pragma once

#include "common/kernels.h"

namespace diffrate::cpu {

// How a kernel runs on several threads without knowing whose they are: `run` splits [0, n) into ranges and calls
// `body(context, begin, end)` on each, from up to `count` threads.
struct Threads {
  int64_t count;
  void (*run)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

template <class Args>
using Kernel = void (*)(const Args&, const Threads&);

struct Kernels {
  const char* name;  // of the instruction set
#define DIFFRATE_MEMBER(kernel, Args) Kernel<Args> kernel;
  DIFFRATE_KERNELS(DIFFRATE_MEMBER, DIFFRATE_MEMBER)  // null where there is none
#undef DIFFRATE_MEMBER
};

// The best table for this processor, chosen once. The environment variable DIFFRATE_CPU_CAPABILITY (plain, avx2 or
// avx512) asks for a lesser one.
const Kernels& kernels();

}  // namespace diffrate::cpu
