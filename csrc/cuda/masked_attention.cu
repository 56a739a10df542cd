#include "cuda/attention_received.cuh"

namespace diffrate::cuda {

const char* masked_received_rows(const MaskedAttentionArgs& a, void* scratch, Stream stream) {
  return launch_received<true>(a, scratch, stream);
}

int64_t masked_attention_scratch_bytes(const MaskedAttentionArgs& a) { return attention_rows_bytes(a, true); }

const char* masked_attention(const MaskedAttentionArgs& a, void* scratch, void* stream) {
  return attention_forward<true, true>(a, scratch, static_cast<Stream>(stream));
}

}  // namespace diffrate::cuda
