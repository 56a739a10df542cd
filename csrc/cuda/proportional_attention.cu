// Attention whose keys count by their sizes.
#include "cuda/attention_forward.cuh"

namespace diffrate::cuda {

const char* proportional_attention(const AttentionArgs& a, const Scratch& scratch, void* stream) {
  return attention_forward<false, true>(a, scratch, stream);
}

}  // namespace diffrate::cuda
