// The class token's row of the attention map, without the map: keys are read once. Of many images a block has all heads
// of one, and so reads whole tokens where heads lie side by side, and takes the mean over heads itself. Of few images
// there is a block for each head.
#include "cuda/attention.cuh"
#include "cuda/head_mean.cuh"

namespace diffrate::cuda {
namespace {

constexpr int kThreads = 384;               // a multiple of as many numbers of heads as possible
constexpr int kLanes = 4;                   // that share a key
constexpr int kGroups = kThreads / kLanes;  // that have keys at the same time
constexpr int64_t kNearBytes = 48 * 1024;   // of logits and biases in shared memory

struct ClassPlan {
  int heads;  // of a block: all or one
  bool near;  // logits are in shared memory, else in scratch memory
};

template <class T_, int kChunks_, bool kAligned_>
struct ClassConfig {
  using T = T_;
  using W = Wide<T>;
  static constexpr int kChunks = kChunks_;  // of a key that a lane takes in one pass
  static constexpr bool kAligned = kAligned_;
  static constexpr int kBlocks = kAligned && kChunks < 4 ? 2 : 1;  // that a multiprocessor holds, at least
  static constexpr int kCount = Chunk<T>::kCount;
  static constexpr int kPass = kLanes * kChunks * kCount;  // channels
  static constexpr int kKeys = kChunks <= 2 ? 3 : 2;       // that a lane has asked for and not yet used
};

template <class C>
struct ClassPass {
  using T = typename C::T;
  using W = typename C::W;
  using Query = W[C::kChunks][C::kCount];
  using Keys = Chunk<T>[C::kKeys][C::kChunks];

  const AttentionArgs& a;
  const Heads& q;  // separately: read from `a`, they make the compiler generate worse loops
  const Heads& k;
  const int heads, tokens, head_dim;
  int64_t image, first_head;
  int head, token, step;  // of this group: the head among the block's, the first token, and the way to the next
  W* logits;              // (heads, tokens)
  W* biases;              // what keys' sizes add to the logits; null: not in shared memory
  W* shares;              // of each head: one through the sum of its exponentials

  __device__ ClassPass(const AttentionArgs& args, const Heads& q_heads, const Heads& k_heads, const ClassPlan& plan,
                       W* rows)
      : a(args),
        q(q_heads),
        k(k_heads),
        heads(plan.heads),
        tokens(static_cast<int>(args.tokens)),
        head_dim(static_cast<int>(args.head_dim)) {
    const unsigned of_image = static_cast<unsigned>(args.heads) / static_cast<unsigned>(heads);
    image = blockIdx.x / of_image;
    first_head = blockIdx.x % of_image;
    const int group = static_cast<int>(threadIdx.x) / kLanes;
    step = kGroups / heads;
    head = group % heads;
    token = group / heads < step ? group / heads : tokens;  // what is left over has no keys
    Shared shared(shared_memory());
    shares = shared.take<W>(heads);
    biases = plan.near ? shared.take<W>(tokens) : nullptr;
    logits = plan.near ? shared.take<W>(heads * tokens) : rows + blockIdx.x * args.tokens;
  }

  __device__ int channel(int pass, int u) const {
    return (pass * C::kChunks + u) * kLanes * C::kCount + static_cast<int>(threadIdx.x) % kLanes * C::kCount;
  }
  __device__ const T* start_of(const Heads& from) const { return head_of<T>(from, image, first_head + head); }

  // The group's keys from `first` on, those past the last token as zeros.
  __device__ __forceinline__ void load_keys(const T* start, int first, int pass, Keys& keys) const {
#pragma unroll
    for (int i = 0; i < C::kKeys; ++i) {
      const int key = first + i * step + token;
      const T* row = start + key * k.stride_token;
#pragma unroll
      for (int u = 0; u < C::kChunks; ++u)
        keys[i][u] = key < tokens ? load_chunk(row, channel(pass, u), head_dim, C::kAligned) : Chunk<T>{};
    }
  }

  __device__ __forceinline__ void write_logits(int first, int pass, const Keys& keys, const Query& query) const {
    W dots[C::kKeys] = {};
#pragma unroll
    for (int i = 0; i < C::kKeys; ++i)
#pragma unroll
      for (int u = 0; u < C::kChunks; ++u)
#pragma unroll
        for (int n = 0; n < C::kCount; ++n) dots[i] += keys[i][u][n] * query[u][n];
#pragma unroll
    for (int i = 0; i < C::kKeys; ++i) {
      for (int offset = 1; offset < kLanes; offset *= 2) dots[i] += __shfl_xor_sync(kAllLanes, dots[i], offset);
      const int key = first + i * step + token;
      if (threadIdx.x % kLanes != 0 || key >= tokens) continue;
      W& logit = logits[head * tokens + key];
      logit = pass == 0 ? dots[i] : logit + dots[i];
    }
  }

  __device__ void put_biases() const {
    if (biases == nullptr) return;
    for (int j = static_cast<int>(threadIdx.x); j < tokens; j += kThreads)
      biases[j] = bias_of_key<W>(a.size, image, j, a.tokens);
  }
  __device__ W bias(int key) const {
    return biases != nullptr ? biases[key] : bias_of_key<W>(a.size, image, key, a.tokens);
  }

  // Logits of all keys, but for what their sizes add.
  __device__ __forceinline__ void multiply() const {
    for (int pass = 0; pass * C::kPass < head_dim; ++pass) {
      Chunk<T> raw[C::kChunks];
#pragma unroll
      for (int u = 0; u < C::kChunks; ++u) raw[u] = load_chunk(start_of(q), channel(pass, u), head_dim, C::kAligned);
      const T* start = start_of(k);
      Keys keys;
      load_keys(start, 0, pass, keys);  // before anything is waited for
      if (pass == 0) put_biases();
      Query query;
#pragma unroll
      for (int u = 0; u < C::kChunks; ++u)
#pragma unroll
        for (int n = 0; n < C::kCount; ++n) query[u][n] = raw[u][n] * static_cast<W>(a.scale * kLog2OfE);
      for (int first = 0; first < tokens; first += C::kKeys * step) {  // the same rounds in all lanes
        write_logits(first, pass, keys, query);
        load_keys(start, first + C::kKeys * step, pass, keys);
      }
    }
  }

  // From logits to exponentials, and their sum: a warp for each head.
  __device__ void exponentiate() const {
    for (int of = warp_id(); of < heads; of += kThreads / kWarp) {
      W* row = logits + of * tokens;
      W top = -static_cast<W>(INFINITY), sum = 0;
#pragma unroll 4
      for (int j = lane_id(); j < tokens; j += kWarp) {
        row[j] += bias(j);
        top = greater(top, row[j]);
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2) top = greater(top, __shfl_xor_sync(kAllLanes, top, offset));
#pragma unroll 4
      for (int j = lane_id(); j < tokens; j += kWarp) sum += row[j] = power_of_two(row[j] - top);
      sum = warp_sum(sum);
      if (lane_id() == 0) shares[of] = 1 / sum;
    }
  }

  __device__ void write_row(W* row) const {
    for (int j = static_cast<int>(threadIdx.x); j < tokens; j += kThreads) row[j] = logits[j] * shares[0];
  }

  __device__ void write_mean() const {
    W* importance = static_cast<W*>(a.importance) + image * (a.tokens - a.prefix) - a.prefix;
    for (int j = static_cast<int>(a.prefix + threadIdx.x); j < tokens; j += kThreads) {
      W sum = 0;
      for (int of = 0; of < heads; ++of) sum += logits[of * tokens + j] * shares[of];
      importance[j] = sum / static_cast<W>(heads);
    }
  }
};

// rows: (B, H, N), for blocks of one head.
template <class C>
__global__ void __launch_bounds__(kThreads, C::kBlocks)
    class_attention_kernel(AttentionArgs a, Heads q, Heads k, ClassPlan plan, typename C::W* rows) {
  const ClassPass<C> pass(a, q, k, plan, rows);
  pass.multiply();
  __syncthreads();
  pass.exponentiate();
  __syncthreads();
  if (rows == nullptr)
    pass.write_mean();
  else
    pass.write_row(rows + blockIdx.x * a.tokens);
}

template <class C>
const char* launch_class(const AttentionArgs& a, const ClassPlan& plan, void* rows, Stream stream) {
  using W = typename C::W;
  Shared shared(nullptr);
  shared.take<W>(plan.heads);
  if (plan.near) shared.take<W>(a.tokens), shared.take<W>(plan.heads * a.tokens);
  return launch(class_attention_kernel<C>, a.images * a.heads / plan.heads, kThreads, shared.bytes(), stream, a, a.q,
                a.k, plan, static_cast<W*>(rows));
}

// Half precision has kernels for the usual heads; the others take many channels in several passes.
template <class T>
const char* start(const AttentionArgs& a, const ClassPlan& plan, void* rows, Stream stream) {
  if (!aligned_heads<T>(a.k, a.head_dim) || !aligned_heads<T>(a.q, a.head_dim))
    return launch_class<ClassConfig<T, 4, false>>(a, plan, rows, stream);
  if constexpr (sizeof(T) == 2) {
    if (a.head_dim <= ClassConfig<T, 2, true>::kPass)
      return launch_class<ClassConfig<T, 2, true>>(a, plan, rows, stream);
    if (a.head_dim <= ClassConfig<T, 3, true>::kPass)
      return launch_class<ClassConfig<T, 3, true>>(a, plan, rows, stream);
  }
  return launch_class<ClassConfig<T, 4, true>>(a, plan, rows, stream);
}

}  // namespace

const char* class_attention(const AttentionArgs& a, const Scratch& scratch, void* on) {
  Stream stream = static_cast<Stream>(on);
  if (a.tokens > INT32_MAX / 2) return "too many tokens";
  const int64_t row_bytes = a.tokens * (a.type == Type::f64 ? 8 : 4);
  // half of the multiprocessors read as fast as blocks for each head, and the mean needs no launch
  const bool all_heads =
      2 * a.images >= multiprocessors() && a.heads <= kGroups && (a.heads + 1) * row_bytes <= kNearBytes && a.heads > 0;
  const ClassPlan plan{all_heads ? static_cast<int>(a.heads) : 1, all_heads || 2 * row_bytes <= kNearBytes};
  void* rows = all_heads ? nullptr : scratch.take(a.images * a.heads * row_bytes);
  const char* error = dispatch(a.type, [&](auto example) { return start<decltype(example)>(a, plan, rows, stream); });
  if (error != nullptr || all_heads) return error;
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
