// Stands in for the CUDA kernels in a build without a CUDA toolkit.
#include "cuda/kernels.h"

namespace diffrate::cuda {
namespace {
const char* kAbsent =
    "diffrate_ext was built without CUDA kernels; build it where nvcc and a CUDA build of torch are found";
}

const char* sort_tokens(const SortArgs&, void*) { return kAbsent; }
const char* prune_merge(const PruneMergeArgs&, void*, void*) { return kAbsent; }
const char* masked_prune_merge(const MaskedPruneMergeArgs&, void*, void*) { return kAbsent; }
const char* merge_reduce(const MergeReduceArgs&, void*) { return kAbsent; }
const char* merge_reduce_backward(const MergeReduceArgs&, void*) { return kAbsent; }
const char* class_attention(const AttentionArgs&, void*, void*) { return kAbsent; }
const char* received_attention(const AttentionArgs&, void*, void*) { return kAbsent; }
const char* proportional_attention(const MaskedAttentionArgs&, void*, void*) { return kAbsent; }
const char* masked_attention(const MaskedAttentionArgs&, void*, void*) { return kAbsent; }
const char* masked_attention_backward(const MaskedAttentionArgs&, void*, void*) { return kAbsent; }
const char* compression_rate(const CompressionRateArgs&, void*) { return kAbsent; }
const char* compression_rate_backward(const CompressionRateArgs&, void*) { return kAbsent; }
int64_t prune_merge_scratch_bytes(const PruneMergeArgs&) { return 0; }
int64_t masked_prune_merge_scratch_bytes(const MaskedPruneMergeArgs&) { return 0; }
int64_t class_attention_scratch_bytes(const AttentionArgs&) { return 0; }
int64_t received_attention_scratch_bytes(const AttentionArgs&) { return 0; }
int64_t proportional_attention_scratch_bytes(const MaskedAttentionArgs&) { return 0; }
int64_t masked_attention_scratch_bytes(const MaskedAttentionArgs&) { return 0; }
int64_t masked_attention_backward_scratch_bytes(const MaskedAttentionArgs&) { return 0; }
const char* architectures() { return ""; }

}  // namespace diffrate::cuda
