// Stands in for the CUDA kernels in a build without a CUDA toolkit.
#include "cuda/kernels.h"

namespace diffrate::cuda {
namespace {
const char* kAbsent =
    "diffrate_ext was built without CUDA kernels; build it where nvcc and a CUDA build of torch are found";
}

const char* sort_tokens(const SortArgs&, void*) { return kAbsent; }
const char* prune_merge(const PruneMergeArgs&, void*, void*) { return kAbsent; }
const char* merge_reduce(const MergeReduceArgs&, void*) { return kAbsent; }
const char* merge_reduce_backward(const MergeReduceArgs&, void*) { return kAbsent; }
int64_t prune_merge_scratch_bytes(const PruneMergeArgs&) { return 0; }
const char* architectures() { return ""; }

}  // namespace diffrate::cuda
