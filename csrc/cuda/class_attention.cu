// The class token's row of the attention map, without the map: a block for each head.
#include "cuda/attention.cuh"
#include "cuda/head_mean.cuh"

namespace diffrate::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLanes = 8;  // that share a key

// A head's channels in whole chunks.
template <class T>
__host__ __device__ constexpr int64_t padded(int64_t head_dim) {
  return (head_dim + Chunk<T>::kCount - 1) / Chunk<T>::kCount * Chunk<T>::kCount;
}

// The reduction of a number over the block, the same in all threads. `shared` has a number for each warp.
template <class W, class Reduce>
__device__ W over_block(W value, W* shared, Reduce reduce) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = reduce(value, __shfl_xor_sync(kAllLanes, value, offset));
  __syncthreads();  // what was there has been read
  if (lane_id() == 0) shared[warp_id()] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value = reduce(value, shared[warp]);
  return value;
}

// q and k are passed separately: read from `a`, they make the compiler generate worse loops.
template <class T>
__global__ void __launch_bounds__(kThreads)
    class_attention_kernel(AttentionArgs a, Heads q_heads, Heads k_heads, Wide<T>* rows, bool aligned) {
  using W = Wide<T>;
  constexpr int kCount = Chunk<T>::kCount;
  Shared shared(shared_memory());
  W* query = shared.take<W>(padded<T>(a.head_dim));
  W* of_warps = shared.take<W>(kWarps);
  int64_t image = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const T* q = head_of<T>(q_heads, image, head);
  const T* k = head_of<T>(k_heads, image, head);
  W* row = rows + blockIdx.x * a.tokens;
  for (int64_t c = threadIdx.x; c < padded<T>(a.head_dim); c += kThreads)
    query[c] = c < a.head_dim ? to_wide(q[c]) * static_cast<W>(a.scale * kLog2OfE) : W(0);
  __syncthreads();

  W top = -static_cast<W>(INFINITY);
  int lane = static_cast<int>(threadIdx.x) % kLanes;
  // whole groups of keys, so that all lanes take part in the sums
#pragma unroll 2
  for (int64_t first = 0; first < a.tokens; first += kThreads / kLanes) {
    int64_t token = first + threadIdx.x / kLanes;
    const T* key = k + (token < a.tokens ? token : 0) * k_heads.stride_token;
    W dot = 0;
    for (int64_t c = lane * kCount; c < a.head_dim; c += kLanes * kCount) {
      Chunk<T> chunk = load_chunk(key, c, a.head_dim, aligned);
#pragma unroll
      for (int i = 0; i < kCount; ++i) dot += chunk[i] * query[c + i];
    }
    for (int offset = kLanes / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(kAllLanes, dot, offset);
    W logit = dot + bias_of_key<W>(a.size, image, token, a.tokens);
    top = greater(top, logit);
    if (lane == 0 && token < a.tokens) row[token] = logit;
  }
  top = over_block(top, of_warps, [](W x, W y) { return greater(x, y); });
  W sum = 0;
  for (int64_t j = threadIdx.x; j < a.tokens; j += kThreads) {
    W e = power_of_two(row[j] - top);
    row[j] = e;
    sum += e;
  }
  sum = over_block(sum, of_warps, [](W x, W y) { return x + y; });
  W share = 1 / sum;
  for (int64_t j = threadIdx.x; j < a.tokens; j += kThreads) row[j] *= share;
}

}  // namespace

const char* class_attention(const AttentionArgs& a, const Scratch& scratch, void* on) {
  Stream stream = static_cast<Stream>(on);
  void* rows = scratch.take(a.images * a.heads * a.tokens * (a.type == Type::f64 ? 8 : 4));
  const char* error = dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    Shared shared(nullptr);
    shared.take<Wide<T>>(padded<T>(a.head_dim));
    shared.take<Wide<T>>(kWarps);
    return launch(class_attention_kernel<T>, a.images * a.heads, kThreads, shared.bytes(), stream, a, a.q, a.k,
                  static_cast<Wide<T>*>(rows), aligned_heads<T>(a.k, a.head_dim));
  });
  if (error != nullptr) return error;
  return head_mean({.type = a.type,
                    .images = a.images,
                    .heads = a.heads,
                    .tokens = a.tokens,
                    .prefix = a.prefix,
                    .rows = rows,
                    .received = false,
                    .mask = {},
                    .importance = a.importance},
                   stream);
}

}  // namespace diffrate::cuda
