// Attention of the search step: a mask hides tokens.
#include "cuda/attention_received.cuh"

namespace diffrate::cuda {

const char* masked_sum_over_queries(const AttentionArgs& a, void* scratch, Stream stream) {
  return launch_received<true>(a, scratch, stream);
}

const char* masked_attention(const AttentionArgs& a, const Scratch& scratch, void* stream) {
  return attention_forward<true, true>(a, scratch, stream);
}

}  // namespace diffrate::cuda
