// The table of entry points of one instruction set.
#include "cpu/kernels.h"

#define DIFFRATE_STRING_OF(x) #x
#define DIFFRATE_STRING(x) DIFFRATE_STRING_OF(x)

namespace diffrate::cpu::DIFFRATE_SIMD {

#define DIFFRATE_DECLARE(kernel, Args) void kernel(const Args&, const Threads&);
#define DIFFRATE_NOTHING(kernel, Args)
DIFFRATE_KERNELS(DIFFRATE_DECLARE, DIFFRATE_NOTHING)

#define DIFFRATE_ENTRY(kernel, Args) .kernel = kernel,
#define DIFFRATE_NO_ENTRY(kernel, Args) .kernel = nullptr,
extern const Kernels table;
const Kernels table = {.name = DIFFRATE_STRING(DIFFRATE_SIMD), DIFFRATE_KERNELS(DIFFRATE_ENTRY, DIFFRATE_NO_ENTRY)};

}  // namespace diffrate::cpu::DIFFRATE_SIMD
