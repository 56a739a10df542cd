// The CUDA kernels. Each launches on `stream` of the current device and returns nullptr, or what went wrong.
#pragma once

#include "common/arguments.h"

namespace diffrate::cuda {

const char* sort_tokens(const SortArgs&, void* stream);
const char* prune_merge(const PruneMergeArgs&, void* scratch, void* stream);
const char* merge_reduce(const MergeReduceArgs&, void* stream);
const char* merge_reduce_backward(const MergeReduceArgs&, void* stream);

// Bytes of device memory that prune_merge needs as `scratch`.
int64_t prune_merge_scratch_bytes(const PruneMergeArgs&);

// The architectures that the kernels were compiled for, such as "80-real 90"; empty in a build without CUDA.
const char* architectures();

}  // namespace diffrate::cuda
