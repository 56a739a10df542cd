// Attention whose keys count by their sizes.
#include "cuda/attention_forward.cuh"
#include "cuda/short_attention_variants.cuh"

namespace diffrate::cuda {

const char* proportional_attention(const AttentionArgs& a, const Scratch& scratch, void* stream) {
  const ShortChoice choice = choose_short_attention(a);
  if (choice.error != nullptr) return choice.error;
  if (choice.variant < 0) return attention_forward<false, true>(a, scratch, stream);
  void* rows = attention_rows_memory(a, false, scratch);
  Stream on = static_cast<Stream>(stream);
  const char* error = short_attention(a, choice, a.importance == nullptr ? nullptr : static_cast<float*>(rows), on);
  return error != nullptr ? error : mean_over_heads(a, false, rows, on);
}

}  // namespace diffrate::cuda
