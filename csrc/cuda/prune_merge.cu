// Sort, prune and merge in four plain launches: sort, keep, match, merge. Deterministic: no atomics.
#include "cuda/common.cuh"

namespace diffrate::cuda {
namespace {

// Device memory between the launches.
struct Scratch {
  int64_t* order;  // (B, N)
  void* inverse;   // (B, k_p) wide: 1 / norm of each kept token
  void* cosine;    // (B, k_p - k_m) wide: of each source and its destination
  int* match;      // (B, k_p - k_m): the destination
};

int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

Scratch carve(const PruneMergeArgs& a, char* memory, int64_t* total) {
  int64_t sources = a.k_p - a.k_m;
  Scratch s;
  char* next = memory;
  auto take = [&next](int64_t bytes) {
    char* piece = next;
    next += align(bytes);
    return piece;
  };
  s.order = reinterpret_cast<int64_t*>(take(a.images * a.tokens * 8));
  s.inverse = take(a.images * a.k_p * 8);
  s.cosine = take(a.images * sources * 8);
  s.match = reinterpret_cast<int*>(take(a.images * sources * 4));
  *total = next - memory;
  return s;
}

// One channel of an input token, with the residual added as eager PyTorch would (rounded to T).
template <class T>
__device__ Wide<T> token_channel(const PruneMergeArgs& a, int64_t image, int64_t token, int64_t c) {
  const T* x = static_cast<const T*>(a.x.data);
  Wide<T> value = to_wide(x[image * a.x.stride_image + token * a.x.stride_token + c]);
  if (a.residual.data == nullptr) return value;
  const T* residual = static_cast<const T*>(a.residual.data);
  value += to_wide(residual[image * a.residual.stride_image + token * a.residual.stride_token + c]);
  return to_wide(from_wide<T>(value));
}

// One block per sorted position: copies what stays, and takes the norms of destinations and sources.
template <class T>
__global__ void keep_kernel(PruneMergeArgs a, Scratch s) {
  using W = Wide<T>;
  int64_t row = blockIdx.x, image = row / a.tokens, position = row % a.tokens;
  int64_t token = s.order[row];
  if (threadIdx.x == 0 && (position < a.k_m || position >= a.k_p))
    a.slot[image * a.tokens + token] = position < a.k_m ? position : -1;
  if (position >= a.k_p) return;
  T* out = static_cast<T*>(a.out) + (image * a.k_m + position) * a.channels;
  W squares = 0;
  for (int64_t c = threadIdx.x; c < a.channels; c += blockDim.x) {
    W value = token_channel<T>(a, image, token, c);
    if (position < a.k_m) out[c] = from_wide<T>(value);
    squares += value * value;
  }
  W norm = sqrt(block_sum(squares));
  if (threadIdx.x != 0) return;
  static_cast<W*>(s.inverse)[image * a.k_p + position] = 1 / (norm < W(kNormEpsilon) ? W(kNormEpsilon) : norm);
  if (position < a.k_m) static_cast<W*>(a.out_size)[image * a.k_m + position] = size_of<W>(a.size, image, token);
}

// One block per source: each warp compares it with every (kThreads / kWarp)-th destination.
template <class T>
__global__ void match_kernel(PruneMergeArgs a, Scratch s) {
  using W = Wide<T>;
  constexpr int kWarps = kThreads / kWarp;
  int64_t sources = a.k_p - a.k_m;
  int64_t image = blockIdx.x / sources, source = blockIdx.x % sources;
  int64_t token = s.order[image * a.tokens + a.k_m + source];
  const W* inverse = static_cast<const W*>(s.inverse) + image * a.k_p;
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  W best = -CUDART_INF;
  int64_t best_position = -1;
  for (int64_t to = a.prefix + warp; to < a.k_m; to += kWarps) {
    const T* row = static_cast<const T*>(a.out) + (image * a.k_m + to) * a.channels;
    W dot = 0;
    for (int64_t c = lane; c < a.channels; c += kWarp) dot += to_wide(row[c]) * token_channel<T>(a, image, token, c);
    dot = warp_sum(dot) * inverse[to];
    if (dot > best) {
      best = dot;
      best_position = to;
    }
  }
  __shared__ W warp_best[kWarps];
  __shared__ int64_t warp_position[kWarps];
  if (lane == 0) {
    warp_best[warp] = best;
    warp_position[warp] = best_position;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarps; ++i) {
    bool wins =
        warp_best[i] > best || (warp_best[i] == best && warp_position[i] >= 0 && warp_position[i] < best_position);
    if (wins) {
      best = warp_best[i];
      best_position = warp_position[i];
    }
  }
  // a source that is similar to nothing (NaN features) goes to the first destination
  bool none = best_position < 0;
  if (none) best_position = a.prefix;
  s.match[image * sources + source] = static_cast<int>(best_position);
  static_cast<W*>(s.cosine)[image * sources + source] =
      none ? static_cast<W>(CUDART_NAN) : best * inverse[a.k_m + source];
  a.slot[image * a.tokens + token] = best_position;
}

// One block per destination: adds its sources in ascending order.
template <class T>
__global__ void merge_kernel(PruneMergeArgs a, Scratch s) {
  using W = Wide<T>;
  int64_t destinations = a.k_m - a.prefix, sources = a.k_p - a.k_m;
  int64_t image = blockIdx.x / destinations, to = blockIdx.x % destinations + a.prefix;
  const int* match = s.match + image * sources;
  const int64_t* order = s.order + image * a.tokens;
  auto weight = [&](int64_t position) {
    W size = a.weighted ? size_of<W>(a.size, image, order[position]) : W(1);
    return size > W(kTinySize) ? size : W(kTinySize);
  };
  W own = weight(to), total = own, gained = 0;
  bool merged = false;
  for (int64_t i = 0; i < sources; ++i) {
    if (match[i] != to) continue;
    merged = true;
    total += weight(a.k_m + i);
    W size = size_of<W>(a.size, image, order[a.k_m + i]);
    gained += a.cosine_sizes ? size * static_cast<const W*>(s.cosine)[image * sources + i] : size;
  }
  if (!merged) return;
  T* out = static_cast<T*>(a.out) + (image * a.k_m + to) * a.channels;
  for (int64_t c = threadIdx.x; c < a.channels; c += blockDim.x) {
    W sum = to_wide(out[c]) * own;
    for (int64_t i = 0; i < sources; ++i)
      if (match[i] == to) sum += token_channel<T>(a, image, order[a.k_m + i], c) * weight(a.k_m + i);
    out[c] = from_wide<T>(sum / total);
  }
  if (threadIdx.x == 0) static_cast<W*>(a.out_size)[image * a.k_m + to] += gained;
}

}  // namespace

int64_t prune_merge_scratch_bytes(const PruneMergeArgs& a) {
  int64_t bytes;
  carve(a, nullptr, &bytes);
  return bytes;
}

const char* prune_merge(const PruneMergeArgs& a, void* scratch, void* stream_pointer) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (a.images * a.tokens == 0) return nullptr;
  int64_t bytes;
  Scratch s = carve(a, static_cast<char*>(scratch), &bytes);
  if (const char* error = sort_images(a.importance, a.type == Type::f64, a.images, a.tokens, a.prefix, s.order, stream))
    return error;
  return dispatch(a.type, [&](auto example) -> const char* {
    using T = decltype(example);
    keep_kernel<T><<<static_cast<unsigned>(a.images * a.tokens), kThreads, 0, stream>>>(a, s);
    if (const char* error = launch_error()) return error;
    if (a.k_m == a.k_p) return nullptr;
    match_kernel<T><<<static_cast<unsigned>(a.images * (a.k_p - a.k_m)), kThreads, 0, stream>>>(a, s);
    if (const char* error = launch_error()) return error;
    merge_kernel<T><<<static_cast<unsigned>(a.images * (a.k_m - a.prefix)), kThreads, 0, stream>>>(a, s);
    return launch_error();
  });
}

}  // namespace diffrate::cuda
