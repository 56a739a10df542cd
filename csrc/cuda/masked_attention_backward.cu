// Gradients of masked attention: masked_attention_backward.cuh says how.
#include "cuda/masked_attention_key_gradients.cuh"
#include "cuda/masked_attention_query_gradients.cuh"

namespace diffrate::cuda {
namespace {

// --- kernel 3

constexpr int kSumThreads = 256;

template <class W>
__global__ void __launch_bounds__(kSumThreads) sum_over_heads(AttentionArgs a, void* scratch) {
  int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= a.images * a.tokens) return;
  const W* rows = Statistics<W>(scratch, a.images * a.heads * a.tokens).grad_mask;
  int64_t image = at / a.tokens, token = at % a.tokens;
  W sum = 0;
  for (int64_t head = 0; head < a.heads; ++head) sum += rows[(image * a.heads + head) * a.tokens + token];
  static_cast<W*>(a.grad_mask)[at] = sum;
}

// --- all three

// Starts kernel 1 or 2.
template <class Pass>
const char* start(void (*kernel)(AttentionArgs, Aligned, void*), const AttentionArgs& a, Aligned aligned, void* scratch,
                  Stream stream) {
  return launch(kernel, Pass::Rows::blocks(a), Pass::S::kThreads, typename Pass::Memory(nullptr).bytes, stream, a,
                aligned, scratch);
}

int64_t statistics_bytes(const AttentionArgs& a) {
  int64_t count = a.images * a.heads * a.tokens;
  return a.type == Type::f64 ? Statistics<double>(nullptr, count).bytes : Statistics<float>(nullptr, count).bytes;
}

}  // namespace

const char* masked_attention_backward(const AttentionArgs& a, const Scratch& scratch, void* on) {
  Stream stream = static_cast<Stream>(on);
  void* memory = scratch.take(statistics_bytes(a));
  return dispatch_heads(a.type, a.head_dim, [&](auto example, auto depth) -> const char* {
    using T = decltype(example);
    constexpr int kDepth = decltype(depth)::value;
    Aligned aligned{.q = aligned_heads<T>(a.q, a.head_dim),
                    .k = aligned_heads<T>(a.k, a.head_dim),
                    .v = aligned_heads<T>(a.v, a.head_dim),
                    .grad = aligned_heads<T>(a.grad, a.head_dim),
                    .out = true};
    for (void* out : {a.grad_q, a.grad_k, a.grad_v})
      aligned.out = aligned.out && aligned_rows<T>(out, a.head_dim, a.head_dim, a.head_dim);
    const char* error = start<QueryPass<T, kDepth>>(query_gradients<T, kDepth>, a, aligned, memory, stream);
    if (error == nullptr) error = start<KeyPass<T, kDepth>>(key_gradients<T, kDepth>, a, aligned, memory, stream);
    if (error != nullptr) return error;
    int64_t blocks = (a.images * a.tokens + kSumThreads - 1) / kSumThreads;
    return launch(sum_over_heads<Wide<T>>, blocks, kSumThreads, 0, stream, a, memory);
  });
}

}  // namespace diffrate::cuda
