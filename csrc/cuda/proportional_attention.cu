#include "cuda/attention_forward.cuh"

namespace diffrate::cuda {

int64_t proportional_attention_scratch_bytes(const MaskedAttentionArgs& a) { return attention_rows_bytes(a, false); }

const char* proportional_attention(const MaskedAttentionArgs& a, void* scratch, void* stream) {
  return attention_forward<false, true>(a, scratch, static_cast<Stream>(stream));
}

}  // namespace diffrate::cuda
