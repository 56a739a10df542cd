// The column means of the attention map: in one pass where a head fits shared memory, else what the forward pass finds
// out about each row, without values, then the sums.
#include "cuda/attention_received.cuh"
#include "cuda/received_attention_rows.cuh"

namespace diffrate::cuda {
namespace {

// Calls body(C{}) with the smallest configuration that has room for a head, if there is one.
template <class T, class Body>
bool with_one_pass(const AttentionArgs& a, Body body) {
  auto has_room = [&](auto config) {
    using C = decltype(config);
    if (a.head_dim > C::kDepth || a.tokens > C::kMostTokens) return false;
    if (OnePassShared<C>(nullptr, tiles_of_tokens(a.tokens) * 16).bytes > shared_limit()) return false;
    body(config);
    return true;
  };
  return has_room(OnePassConfig<T, 64, 7>{}) || has_room(OnePassConfig<T, 64, 9>{}) ||
         has_room(OnePassConfig<T, 80, 7>{}) || has_room(OnePassConfig<T, 80, 9>{});
}

template <class C>
const char* one_pass(const AttentionArgs& a, const Scratch& scratch, Stream stream) {
  using T = typename C::T;
  float* sums = static_cast<float*>(scratch.take(a.images * a.heads * a.tokens * static_cast<int64_t>(sizeof(float))));
  const auto kernel = received_one_pass_kernel<C>;
  prefer_shared_memory(kernel);
  const char* error =
      launch(kernel, a.images * a.heads, C::kThreads, OnePassShared<C>(nullptr, tiles_of_tokens(a.tokens) * 16).bytes,
             stream, a, sums, aligned_heads<T>(a.q, a.head_dim) && aligned_heads<T>(a.k, a.head_dim));
  return error != nullptr ? error : mean_over_heads(a, false, sums, stream);
}

}  // namespace

const char* sum_over_queries(const AttentionArgs& a, void* scratch, Stream stream) {
  return launch_received<false>(a, scratch, stream);
}

const char* received_attention(const AttentionArgs& a, const Scratch& scratch, void* stream) {
  AttentionArgs received = a;
  received.received = true;
  return dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    const char* error = nullptr;
    if constexpr (kTensorCores<T>) {
      auto start = [&](auto config) {
        error = one_pass<decltype(config)>(received, scratch, static_cast<Stream>(stream));
      };
      if (with_one_pass<T>(received, start)) return error;
    }
    return attention_forward<false, false>(received, scratch, stream);
  });
}

}  // namespace diffrate::cuda
