// A whole launch: clusters of blocks, one after another, on the calling thread of the operating system.
#pragma once

#include "testing/emulation/block.h"

namespace diffrate::emulation {

// `blocks` is a multiple of `cluster`.
void run_grid(int64_t blocks, int cluster, int threads, int64_t shared_bytes, const Kernel& kernel);

}  // namespace diffrate::emulation
