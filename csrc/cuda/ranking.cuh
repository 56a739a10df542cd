// The sort order without sorting: a patch's place is the number of patches that come before it.
//
// N^2 comparisons, but short ones, all independent, and no barrier between them: for the token counts of vision
// transformers that is as quick as a sort in shared memory, and stable by itself.
#pragma once

#include "cuda/common.cuh"

namespace diffrate::cuda {

template <class W>
using KeyOf = decltype(descending_key(W{}));

// The importance of a patch: the mean over heads and queries. A is the dtype of attention, W that of the sum.
template <class A, class W>
__device__ W importance_at(const Importance& from, int64_t image, int64_t patch) {
  const A* base = static_cast<const A*>(from.data) + image * from.stride_image + patch * from.stride_token;
  W sum = 0;
  for (int64_t head = 0; head < from.heads; ++head)
    for (int64_t query = 0; query < from.queries; ++query)
      sum += static_cast<W>(to_wide(base[head * from.stride_head + query * from.stride_query]));
  return sum / static_cast<W>(from.heads * from.queries);
}

template <class W>
__device__ KeyOf<W> key_at(const Importance& from, int64_t image, int64_t patch) {
  switch (from.type) {
    case Type::f32: return descending_key(importance_at<float, W>(from, image, patch));
    case Type::f64: return descending_key(importance_at<double, W>(from, image, patch));
    case Type::f16: return descending_key(importance_at<__half, W>(from, image, patch));
    default: return descending_key(importance_at<__nv_bfloat16, W>(from, image, patch));
  }
}

// Keys in shared memory are read four at a time. Behind the last key stands what comes after all keys, those of NaN
// too.
constexpr int kKeysAtOnce = 4;
template <class Key>
struct alignas(16) KeyGroup {
  Key keys[kKeysAtOnce];
};
constexpr int padded_keys(int keys) { return (keys + kKeysAtOnce - 1) / kKeysAtOnce * kKeysAtOnce; }

template <class Key>
constexpr Key kPaddingKey = ~Key(0);
// What stands in shared memory for a key: that of NaN makes way for the padding, and no number has what it becomes.
template <class Key>
__device__ Key before_padding(Key key) {
  return key < kPaddingKey<Key> ? key : kPaddingKey<Key> - 1;
}

// A number of each of up to so many heads, all asked for before the first is used.
constexpr int kHeadsAtOnce = 16;
struct HeadNumbers {
  static constexpr int kStep = 4;  // where there are fewer heads, whole steps are left out
  float numbers[kHeadsAtOnce] = {};

  // `first`: that of the first head; `left`: how many heads there are, or more than fit.
  __device__ void ask(const float* first, int64_t stride, int left) {
#pragma unroll
    for (int begin = 0; begin < kHeadsAtOnce; begin += kStep) {
      if (begin >= left) break;
#pragma unroll
      for (int i = begin; i < begin + kStep; ++i)
        if (i < left) numbers[i] = first[i * stride];
    }
  }
  // In ascending order; those that are not there are zeros.
  __device__ float added_to(float sum, int left) const {
#pragma unroll
    for (int begin = 0; begin < kHeadsAtOnce; begin += kStep) {
      if (begin >= left) break;
#pragma unroll
      for (int i = begin; i < begin + kStep; ++i) sum += numbers[i];
    }
    return sum;
  }
};

// The key of a patch's float importance, asked for at once but not waited for before it is used: one number, or one for
// each head in float, as proportional_attention gives them. These are added up in the order of key_at and head_mean, so
// that the mean is theirs, bit by bit. One thread does it for a patch: it waits for memory once, and if several shared
// the heads they would have to wait for each other besides.
class AskedKey {
 public:
  // Not `wanted`: nothing is read, and there is no key.
  __device__ AskedKey(const Importance& from, int64_t image, int64_t patch, bool wanted)
      : from_(from), image_(image), patch_(patch) {
    if (!wanted) return;
    if (by_head())
      heads_.ask(numbers(), from.stride_head, static_cast<int>(from.heads));
    else if (single_half())
      half_ = static_cast<const uint16_t*>(from.data)[place()];
  }
  __device__ uint32_t key() const {
    if (by_head()) return descending_key(mean());
    if (!single_half()) return key_at<float>(from_, image_, patch_);
    return descending_key(from_.type == Type::f16 ? to_wide(bits_as<__half>(half_))
                                                  : to_wide(bits_as<__nv_bfloat16>(half_)));
  }

 private:
  __device__ bool by_head() const { return from_.type == Type::f32 && from_.queries == 1; }
  __device__ bool single_half() const {
    return from_.heads * from_.queries == 1 && (from_.type == Type::f16 || from_.type == Type::bf16);
  }
  __device__ int64_t place() const { return image_ * from_.stride_image + patch_ * from_.stride_token; }
  __device__ const float* numbers() const { return static_cast<const float*>(from_.data) + place(); }

  __device__ float mean() const {
    int left = static_cast<int>(from_.heads);
    float sum = heads_.added_to(0, left);
    const float* next = numbers();
    while ((left -= kHeadsAtOnce) > 0) {
      HeadNumbers more;
      more.ask(next += kHeadsAtOnce * from_.stride_head, from_.stride_head, left);
      sum = more.added_to(sum, left);
    }
    return sum / static_cast<float>(from_.heads);
  }

  const Importance& from_;
  int64_t image_, patch_;
  HeadNumbers heads_;
  uint16_t half_ = 0;
};

// How many of `patches` keys come before that of `patch`; equal keys keep their order. So many neighbouring lanes,
// whole groups of a warp, share the work and get the same result.
template <int kLanes, class Key>
__device__ int rank_of(const Key* keys, int patches, int patch) {
  const KeyGroup<Key>* groups = reinterpret_cast<const KeyGroup<Key>*>(keys);
  Key mine = keys[patch];
  int first = static_cast<int>(threadIdx.x) % kLanes, own = patch / kKeysAtOnce, rank = 0;
#pragma unroll 7
  for (int g = first; g < padded_keys(patches) / kKeysAtOnce; g += kLanes) {
    KeyGroup<Key> group = groups[g];
    Key limit = g < own ? mine + 1 : mine;  // before its own group an equal key counts
#pragma unroll
    for (int i = 0; i < kKeysAtOnce; ++i) rank += group.keys[i] < limit;
  }
  for (int i = own * kKeysAtOnce + first; i < patch; i += kLanes) rank += keys[i] == mine;
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) rank += __shfl_xor_sync(kAllLanes, rank, offset);
  return rank;
}

// How the tokens of all images are shared out when many blocks sort them: each ranks some tokens of one image.
constexpr int kRankingThreads = 256;
constexpr int64_t kRankedTokens = 64;
constexpr int64_t kRankedKeys = 2048;

// What for_ranked_tokens takes of the shared memory, first of all.
template <class W>
__device__ __host__ KeyOf<W>* take_ranked_keys(Shared& shared, int64_t tokens) {
  return shared.take<KeyOf<W>>(tokens < kRankedKeys ? tokens : kRankedKeys);
}

template <class W>
int64_t ranking_shared_bytes(int64_t tokens) {
  Shared shared(nullptr);
  take_ranked_keys<W>(shared, tokens);
  return shared.bytes();
}

inline int64_t ranking_blocks(int64_t images, int64_t tokens) {
  return images * ((tokens + kRankedTokens - 1) / kRankedTokens);
}

// Calls body(image, token, position), by whole warps, for each token of this block and its place in the sort order.
template <class W, class Body>
__device__ void for_ranked_tokens(const Importance& from, int64_t tokens, int64_t prefix, Body body) {
  constexpr int kEach = static_cast<int>(kRankedTokens) * kWarp / kRankingThreads;
  int64_t parts = (tokens + kRankedTokens - 1) / kRankedTokens;
  int64_t image = blockIdx.x / parts, first = blockIdx.x % parts * kRankedTokens + warp_id() * kEach;
  int64_t patches = tokens - prefix;
  Shared shared(shared_memory());
  KeyOf<W>* keys = take_ranked_keys<W>(shared, tokens);
  KeyOf<W> mine[kEach];
  int rank[kEach] = {};
  for (int i = 0; i < kEach; ++i) {
    int64_t token = first + i;
    mine[i] = token >= prefix && token < tokens ? key_at<W>(from, image, token - prefix) : KeyOf<W>(0);
  }
  for (int64_t begin = 0; begin < patches; begin += kRankedKeys) {
    int count = static_cast<int>(patches - begin < kRankedKeys ? patches - begin : kRankedKeys);
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < count; j += kRankingThreads)
      keys[j] = key_at<W>(from, image, begin + j);
    __syncthreads();
    for (int j = lane_id(); j < count; j += kWarp) {
      KeyOf<W> other = keys[j];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        rank[i] += other < mine[i] || (other == mine[i] && j < first + i - prefix - begin);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    int64_t token = first + i, place = prefix + warp_sum(rank[i]);
    if (token < tokens) body(image, token, token < prefix ? token : place);
  }
}

}  // namespace diffrate::cuda
