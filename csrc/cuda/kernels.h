// The CUDA kernels. Each launches on `stream` of the current device and returns nullptr, or what went wrong.
// `scratch` is device memory of as many bytes as the function beside says.
#pragma once

#include "common/arguments.h"

namespace diffrate::cuda {

const char* sort_tokens(const SortArgs&, void* stream);
const char* prune_merge(const PruneMergeArgs&, void* scratch, void* stream);
int64_t prune_merge_scratch_bytes(const PruneMergeArgs&);
const char* masked_prune_merge(const MaskedPruneMergeArgs&, void* scratch, void* stream);
int64_t masked_prune_merge_scratch_bytes(const MaskedPruneMergeArgs&);
const char* merge_reduce(const MergeReduceArgs&, void* stream);
const char* merge_reduce_backward(const MergeReduceArgs&, void* stream);

const char* class_attention(const AttentionArgs&, void* scratch, void* stream);
int64_t class_attention_scratch_bytes(const AttentionArgs&);
const char* received_attention(const AttentionArgs&, void* scratch, void* stream);
int64_t received_attention_scratch_bytes(const AttentionArgs&);
const char* proportional_attention(const MaskedAttentionArgs&, void* scratch, void* stream);
int64_t proportional_attention_scratch_bytes(const MaskedAttentionArgs&);
const char* masked_attention(const MaskedAttentionArgs&, void* scratch, void* stream);
int64_t masked_attention_scratch_bytes(const MaskedAttentionArgs&);
const char* masked_attention_backward(const MaskedAttentionArgs&, void* scratch, void* stream);
int64_t masked_attention_backward_scratch_bytes(const MaskedAttentionArgs&);
const char* compression_rate(const CompressionRateArgs&, void* stream);
const char* compression_rate_backward(const CompressionRateArgs&, void* stream);

// The architectures that the kernels were compiled for, such as "80-real 90"; empty in a build without CUDA.
const char* architectures();

}  // namespace diffrate::cuda
