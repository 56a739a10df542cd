// The CPU kernels: one table of entry points for each instruction set they were compiled for.
#pragma once

#include "common/arguments.h"

namespace diffrate::cpu {

// How a kernel runs on several threads without knowing whose they are: `run` splits [0, n) into ranges and calls
// `body(context, begin, end)` on each, from up to `count` threads.
struct Threads {
  int64_t count;
  void (*run)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

struct Kernels {
  const char* name;
  void (*sort_tokens)(const SortArgs&, const Threads&);
  void (*prune_merge)(const PruneMergeArgs&, const Threads&);
  void (*merge_reduce)(const MergeReduceArgs&, const Threads&);
  void (*merge_reduce_backward)(const MergeReduceArgs&, const Threads&);
  void (*class_attention)(const AttentionArgs&, const Threads&);
  void (*received_attention)(const AttentionArgs&, const Threads&);
  void (*masked_attention)(const MaskedAttentionArgs&, const Threads&);
  void (*masked_attention_backward)(const MaskedAttentionArgs&, const Threads&);
  void (*compression_rate)(const CompressionRateArgs&, const Threads&);
  void (*compression_rate_backward)(const CompressionRateArgs&, const Threads&);
  void (*masked_prune_merge)(const MaskedPruneMergeArgs&, const Threads&);
};

// The best table for this processor, chosen once. The environment variable DIFFRATE_CPU_CAPABILITY (plain, avx2 or
// avx512) asks for a lesser one.
const Kernels& kernels();

}  // namespace diffrate::cpu
