// The column means of the attention map: what the forward pass knows of each row, without values, then the sums.
#include "cuda/attention_received.cuh"

namespace diffrate::cuda {
namespace {

MaskedAttentionArgs forward_arguments(const AttentionArgs& a) {
  MaskedAttentionArgs forward{};
  forward.type = a.type;
  forward.images = a.images;
  forward.heads = a.heads;
  forward.tokens = a.tokens;
  forward.head_dim = a.head_dim;
  forward.prefix = a.prefix;
  forward.q = {a.q, a.q_stride_image, a.q_stride_head, a.q_stride_token};
  forward.k = {a.k, a.k_stride_image, a.k_stride_head, a.k_stride_token};
  forward.size = a.size;
  forward.scale = a.scale;
  forward.received = true;
  forward.importance = a.importance;
  return forward;
}

}  // namespace

const char* received_rows(const MaskedAttentionArgs& a, void* scratch, Stream stream) {
  return launch_received<false>(a, scratch, stream);
}

int64_t received_attention_scratch_bytes(const AttentionArgs& a) {
  return attention_rows_bytes(forward_arguments(a), false);
}

const char* received_attention(const AttentionArgs& a, void* scratch, void* stream) {
  return attention_forward<false, false>(forward_arguments(a), scratch, static_cast<Stream>(stream));
}

}  // namespace diffrate::cuda
