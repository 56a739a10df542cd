// The column means of the attention map: what the forward pass finds out about each row, without values, then the sums.
#include "cuda/attention_received.cuh"

namespace diffrate::cuda {

const char* sum_over_queries(const AttentionArgs& a, void* scratch, Stream stream) {
  return launch_received<false>(a, scratch, stream);
}

const char* received_attention(const AttentionArgs& a, const Scratch& scratch, void* stream) {
  AttentionArgs received = a;
  received.received = true;
  return attention_forward<false, false>(received, scratch, stream);
}

}  // namespace diffrate::cuda
