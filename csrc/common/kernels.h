// The list of all kernels. Everything that has to name each of them follows from it: the table of the CPU kernels
// (cpu/kernels.h, cpu/table.cpp), that of the CUDA kernels (cuda/kernels.h, cuda/table.cpp) and what the operators call
// (ops/run.h).
#pragma once

#include "common/arguments.h"

// CPU_AND_CUDA(name, Args) for each kernel of both, CUDA_ONLY(name, Args) for each that the CPU lacks.
#define DIFFRATE_KERNELS(CPU_AND_CUDA, CUDA_ONLY)                         \
  CPU_AND_CUDA(sort_tokens, SortArgs)                                     \
  CPU_AND_CUDA(add_norm, AddNormArgs)                                     \
  CPU_AND_CUDA(prune_merge, PruneMergeArgs)                               \
  CPU_AND_CUDA(masked_prune_merge, MaskedPruneMergeArgs)                  \
  CPU_AND_CUDA(masked_prune_merge_backward, MaskedPruneMergeBackwardArgs) \
  CPU_AND_CUDA(merge_reduce, MergeReduceArgs)                             \
  CPU_AND_CUDA(merge_reduce_backward, MergeReduceArgs)                    \
  CPU_AND_CUDA(bipartite_match, BipartiteMatchArgs)                       \
  CPU_AND_CUDA(class_attention, AttentionArgs)                            \
  CPU_AND_CUDA(received_attention, AttentionArgs)                         \
  CUDA_ONLY(proportional_attention, AttentionArgs)                        \
  CPU_AND_CUDA(masked_attention, AttentionArgs)                           \
  CPU_AND_CUDA(masked_attention_backward, AttentionArgs)                  \
  CPU_AND_CUDA(compression_rate, CompressionRateArgs)                     \
  CPU_AND_CUDA(compression_rate_backward, CompressionRateArgs)
