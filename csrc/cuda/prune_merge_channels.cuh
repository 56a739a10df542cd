// prune_merge where images are few: the blocks of a cluster share out the channels of an image, not its tokens.
//
// With few images nothing is busy. What takes time is waiting: for memory, then for the other blocks. A block here
// keeps its channels of ALL tokens in shared memory, so it can ask for them before anything is sorted, and reads
// nothing twice:
//
// - ask: importances, sizes and features, all at once.
// - sort: each block for itself.
// - settle: adds the residual, and writes all tokens that are kept to the output as if nothing were merged into them.
// - compare: partial dot products of all sources with all destinations. Each source has an owner among the blocks,
// which
//   is told what concerns it, in its shared memory.
// - decide: the owner adds up the parts, chooses, and tells all blocks.
// - merge: each block writes its channels of the destinations with sources over.
//
// So there is one round trip to device memory and two between blocks. Nothing depends on the order of blocks or warps.
// Rows that are equal have equal cosines, bit by bit: each goes through the same operations in the same order, channels
// of one part first, then the parts. So ties go to the lower position.
//
// For half precision, aligned rows, 1 to 64 sources and at most as many tokens as threads.
#pragma once

#include "cuda/prune_merge_image.cuh"

namespace diffrate::cuda {

constexpr int kChannelThreads = 512;
constexpr int kChannelSources = 64;  // bits of a mask

struct ChannelLayout {
  int own;                        // chunks of 16 bytes of a row that a block has; the last blocks may have fewer
  int padded;                     // as they lie in shared memory: a multiple of 4, zeros behind
  int stride;                     // of a row there, in numbers
  bool residual_inside;           // whether the residual has room in shared memory, too
  int x_stride, residual_stride;  // of tokens in device memory
  int tokens_on, chunks_on;       // how far a thread's next chunk is from its last: see Walk
};

// Shared memory of a block.
template <class T, int kParts>
struct ChannelMemory {
  static constexpr int kWarps = kChannelThreads / kWarp;

  uint32_t* keys;     // (N - P, padded)
  int32_t* order;     // (N): the input position of each sorted position
  int32_t* position;  // (N): the sorted position of each input position
  float* size;        // (N) by input position
  uint64_t* found;    // (sources of an owner, warps): what each warp has found
  float* inverse;     // (sources of an owner): 1 / norm
  T *x, *residual;    // (N, stride)
  // Other blocks read these:
  float* dots;     // (sources, columns): of the block's channels
  float* squares;  // (columns): of the block's channels
  // Other blocks write these:
  int32_t* match;  // (kChannelSources): the sorted position of the destination; -1 past the last source
  float* cosine;   // (kChannelSources): with that destination
  int columns;     // sorted positions 0 .. k_p - 1, padded to a multiple of 8
  int owned;       // sources of an owner: owner p has p, p + parts, ... of them
  int64_t bytes;

  __host__ __device__ ChannelMemory(unsigned char* base, const PruneMergeArgs& a, const ChannelLayout& layout)
      : columns((static_cast<int>(a.k_p) + 7) / 8 * 8), owned((static_cast<int>(a.k_p - a.k_m) + kParts - 1) / kParts) {
    Shared shared(base);
    keys = shared.take<uint32_t>(padded_keys(static_cast<int>(a.tokens - a.prefix)));
    order = shared.take<int32_t>(a.tokens);
    position = shared.take<int32_t>(a.tokens);
    size = shared.take<float>(a.tokens);
    found = shared.take<uint64_t>(owned > kWarps ? owned : kWarps);
    inverse = shared.take<float>(owned);
    dots = shared.take<float>((a.k_p - a.k_m) * columns);
    squares = shared.take<float>(columns);
    match = shared.take<int32_t>(kChannelSources);
    cosine = shared.take<float>(kChannelSources);
    x = shared.take<T>(a.tokens * layout.stride);
    residual = layout.residual_inside ? shared.take<T>(a.tokens * layout.stride) : nullptr;
    bytes = shared.bytes();
  }
};

// One block, its image and its channels.
template <class T, int kParts>
struct ChannelBlock {
  static constexpr int kCount = Chunk<T>::kCount;
  static constexpr int kWarps = kChannelThreads / kWarp;

  const PruneMergeArgs& a;
  const ChannelLayout& layout;
  ChannelMemory<T, kParts> memory;
  int64_t image;
  int part, thread, tokens, channels, prefix, patches, k_p, k_m, sources;
  int own;            // chunks
  const T *x, *more;  // the block's channels of the first token, and of its residual or null

  __device__ ChannelBlock(const PruneMergeArgs& args, const ChannelLayout& how)
      : a(args),
        layout(how),
        memory(shared_memory(), args, how),
        image(blockIdx.x / kParts),
        part(static_cast<int>(blockIdx.x) % kParts),
        thread(static_cast<int>(threadIdx.x)),
        tokens(static_cast<int>(args.tokens)),
        channels(static_cast<int>(args.channels)),
        prefix(static_cast<int>(args.prefix)),
        patches(tokens - prefix),
        k_p(static_cast<int>(args.k_p)),
        k_m(static_cast<int>(args.k_m)),
        sources(k_p - k_m) {
    int left = static_cast<int>(args.channels) / kCount - part * how.own;
    own = left < 0 ? 0 : left < how.own ? left : how.own;
    x = row_of<T>(args.x, image, 0) + first_channel();
    more = args.residual.data == nullptr ? nullptr : row_of<T>(args.residual, image, 0) + first_channel();
  }

  __device__ int first_channel() const { return part * layout.own * kCount; }

  // A thread's chunks of all tokens: number thread, thread + kChannelThreads, ... of (tokens, padded chunks), without a
  // division for each.
  struct Walk {
    const ChannelLayout& layout;
    int token, chunk;
    __device__ explicit Walk(const ChannelLayout& how)
        : layout(how),
          token(static_cast<int>(threadIdx.x) / how.padded),
          chunk(static_cast<int>(threadIdx.x) - token * how.padded) {}
    __device__ void next() {
      token += layout.tokens_on;
      chunk += layout.chunks_on;
      if (chunk >= layout.padded) chunk -= layout.padded, ++token;
    }
    // Where the chunk is, from the block's first channel of the first token.
    __device__ int in_memory() const { return token * layout.stride + chunk * kCount; }
    __device__ int in_x() const { return token * layout.x_stride + chunk * kCount; }
    __device__ int in_residual() const { return token * layout.residual_stride + chunk * kCount; }
  };

  // --- ask

  // What is needed first is asked for first: importance and size of the thread's token. They are on their way while the
  // thread finds its way to the features and asks for them.
  struct First {
    AskedKey key;
    float size;
    __device__ explicit First(const PruneMergeArgs& a)
        : key(a.importance, blockIdx.x / kParts, threadIdx.x, threadIdx.x < a.tokens - a.prefix),
          size(threadIdx.x < a.tokens ? size_of<float>(a.size, blockIdx.x / kParts, threadIdx.x) : 0) {}
  };

  __device__ void ask(const First& first) const {
    for (Walk at(layout); at.token < tokens; at.next()) {
      bool valid = at.chunk < own;  // the others are zeros
      copy_async(memory.x + at.in_memory(), x + (valid ? at.in_x() : 0), valid);
      if (layout.residual_inside && valid) copy_async(memory.residual + at.in_memory(), more + at.in_residual(), true);
    }
    copy_commit();
    // the lanes of a warp prefetch one after another: each warp takes some tokens
    int fetched = lane_id() * kWarps + warp_id();
    if (more != nullptr && !layout.residual_inside && own > 0 && fetched < tokens)
      prefetch_l2(more + fetched * layout.residual_stride, own * 16);

    if (thread < padded_keys(patches))
      memory.keys[thread] = thread < patches ? before_padding(first.key.key()) : kPaddingKey<uint32_t>;
    if (thread < tokens) memory.size[thread] = first.size;
    if (thread < prefix) memory.order[thread] = memory.position[thread] = thread;
    if (thread < kChannelSources) memory.match[thread] = -1;
    __syncthreads();
  }

  // --- sort

  __device__ void sort() const {
    constexpr int kLanes = 2, kAtOnce = kChannelThreads / kLanes;
    for (int first = 0; first < patches; first += kAtOnce) {
      int j = first + thread / kLanes;
      bool inside = j < patches;
      int rank = rank_of<kLanes>(memory.keys, patches, inside ? j : patches - 1);
      if (!inside || thread % kLanes != 0) continue;
      memory.order[prefix + rank] = prefix + j;
      memory.position[prefix + j] = prefix + rank;
    }
    __syncthreads();
  }

  // --- settle

  // Each thread adds the residual, as eager PyTorch would (rounded to T), to what it has asked for itself.
  __device__ void settle() const {
    constexpr int kAhead = 4;
    T* out = static_cast<T*>(a.out) + image * k_m * a.channels + first_channel();
    copy_wait<0>();
    for (Walk at(layout); at.token < tokens;) {
      int position[kAhead], inside[kAhead], channel[kAhead];
      Chunk<T> other[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u, at.next()) {
        bool valid = at.token < tokens && at.chunk < own;
        position[u] = valid ? memory.position[at.token] : k_p;  // what is pruned is of no use
        inside[u] = at.in_memory();
        channel[u] = at.chunk * kCount;
        if (more == nullptr || position[u] >= k_p) continue;
        other[u] =
            layout.residual_inside ? read_chunk(memory.residual + inside[u]) : read_chunk(more + at.in_residual());
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (position[u] >= k_p) continue;
        Chunk<T> chunk = read_chunk(memory.x + inside[u]);
        if (more != nullptr) {
          chunk = sum_of(chunk, other[u]);
          write_chunk(chunk, memory.x + inside[u]);
        }
        if (position[u] < k_m) write_chunk(chunk, out + position[u] * channels + channel[u]);
      }
    }
    __syncthreads();
  }

  // --- compare

  // A warp takes eight tokens at a time, a lane 16 bytes of token lane / 4: as in prune_merge_match.cuh.
  __device__ void compare() const {
    constexpr int kTiles = kChannelSources / 16;
    const int group = lane_id() / 4, quarter = lane_id() % 4;
    int from[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int source = tile * 16 + half * 8 + group;  // past the last source it is the last one: not used
        from[tile][half] = memory.order[k_m + (source < sources ? source : sources - 1)] * layout.stride;
      }
    for (int g = warp_id(); g < memory.columns / 8; g += kWarps) {
      int column = g * 8 + group;
      const T* row = memory.x + memory.order[column < k_p ? column : k_p - 1] * layout.stride;
      const bool destinations = g * 8 < k_m;  // of the others, only the norms are needed
      float squares = 0, sums[kTiles][4] = {};
#pragma unroll 3
      for (int c = quarter * kCount; c < layout.padded * kCount; c += 4 * kCount) {
        Chunk<T> b = read_chunk(row + c);
#pragma unroll
        for (int i = 0; i < kCount; ++i) squares += b[i] * b[i];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (tile * 16 >= sources || !destinations) break;
          Chunk<T> above = read_chunk(memory.x + from[tile][0] + c), below = read_chunk(memory.x + from[tile][1] + c);
          const uint32_t even[4] = {above.words[0], below.words[0], above.words[1], below.words[1]};
          const uint32_t odd[4] = {above.words[2], below.words[2], above.words[3], below.words[3]};
          multiply_accumulate<T>(sums[tile], even, b.words[0], b.words[1]);
          multiply_accumulate<T>(sums[tile], odd, b.words[2], b.words[3]);
        }
      }
      squares += __shfl_xor_sync(kAllLanes, squares, 1);
      squares += __shfl_xor_sync(kAllLanes, squares, 2);
      if (quarter == 0) memory.squares[column] = squares;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int source = tile * 16 + half * 8 + group;
          if (source >= sources || !destinations) continue;
          float* to = memory.dots + source * memory.columns + g * 8 + quarter * 2;
          *reinterpret_cast<float2*>(to) = {sums[tile][half * 2], sums[tile][half * 2 + 1]};
        }
    }
    cluster_barrier_for_shared();
  }

  // --- decide

  // A cosine and whose it is in one number: the least is the largest cosine, at the lowest position. NaN is last.
  __device__ static uint64_t ranked(float cosine, int position) {
    return uint64_t{descending_key(cosine)} << 32 | static_cast<uint32_t>(position);
  }
  static constexpr uint64_t kNone = ~uint64_t{0};

  // Over all blocks, of what this block has at `mine`. All are asked for before the first is used.
  __device__ static float sum_of_parts(float* mine) {
    float number[kParts], sum = 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p) number[p] = *of_block(mine, p);
#pragma unroll
    for (int p = 0; p < kParts; ++p) sum += number[p];
    return sum;
  }
  __device__ static float inverse_norm(float squares) {
    float norm = sqrtf(squares);
    return 1 / (norm < float(kNormEpsilon) ? float(kNormEpsilon) : norm);
  }

  // Some warps for each source that this block owns.
  __device__ void decide() const {
    const int owned = memory.owned, each = owned < kWarps ? kWarps / owned : 1;
    for (int item = warp_id(); item < owned * each; item += kWarps) {
      int mine = item / each, source = mine * kParts + part;
      if (source >= sources) break;  // so are those after it
      float own_squares = sum_of_parts(memory.squares + k_m + source);
      uint64_t best = kNone;
      for (int column = prefix + item % each * kWarp + lane_id(); column < k_m; column += each * kWarp) {
        float dot = sum_of_parts(memory.dots + source * memory.columns + column);
        float squares = sum_of_parts(memory.squares + column);
        uint64_t other = ranked(dot * inverse_norm(squares), column);
        best = other < best ? other : best;
      }
      uint32_t key = __reduce_min_sync(kAllLanes, static_cast<uint32_t>(best >> 32));
      uint32_t position = best >> 32 == key ? static_cast<uint32_t>(best) : UINT32_MAX;
      position = __reduce_min_sync(kAllLanes, position);
      if (lane_id() != 0) continue;
      memory.found[item] = uint64_t{key} << 32 | position;
      if (item % each == 0) memory.inverse[mine] = inverse_norm(own_squares);
    }
    __syncthreads();
    for (int i = thread; i < owned * kParts; i += kChannelThreads) {
      int mine = i / kParts, told = i % kParts, source = mine * kParts + part;
      if (source >= sources) break;
      uint64_t best = kNone;
      for (int k = mine * each; k < (mine + 1) * each; ++k) best = memory.found[k] < best ? memory.found[k] : best;
      // a source that is similar to nothing (NaN features) goes to the first destination
      bool none = best >> 32 == UINT32_MAX;
      float cosine = descending_value(static_cast<uint32_t>(best >> 32)) * memory.inverse[mine];
      of_block(memory.match, told)[source] = none ? prefix : static_cast<int32_t>(static_cast<uint32_t>(best));
      of_block(memory.cosine, told)[source] = none ? not_a_number<float>() : cosine;
    }
    cluster_barrier();
  }

  // --- merge

  // The sources of the destination at a position, a bit for each.
  __device__ uint64_t sources_of(int position) const {
    uint64_t mask = 0;
#pragma unroll 4
    for (int s = 0; s < sources; s += 4) {
      int4 match = *reinterpret_cast<const int4*>(memory.match + s);
      unsigned bits =
          (match.x == position) | (match.y == position) << 1 | (match.z == position) << 2 | (match.w == position) << 3;
      mask |= uint64_t{bits} << s;
    }
    return mask;
  }
  // Calls body(source) in ascending order.
  template <class Body>
  __device__ static void for_sources(uint64_t mask, Body body) {
    for (; mask != 0; mask &= mask - 1) body(__ffsll(static_cast<long long>(mask)) - 1);
  }

  __device__ float weight(int position) const {
    float size = a.weighted_mean ? memory.size[memory.order[position]] : 1.0f;
    return size > float(kTinySize) ? size : float(kTinySize);
  }
  __device__ Chunk<T> chunk_at(int position, int c) const {
    return read_chunk(memory.x + memory.order[position] * layout.stride + c);
  }

  // The mean over a destination and its sources: a thread for each of its chunks, the ones at its first source.
  __device__ void merge() const {
    T* out = static_cast<T*>(a.out) + image * k_m * a.channels + first_channel();
    for (int i = thread; i < sources * own; i += kChannelThreads) {
      int source = i / own, c = i % own * kCount, to = memory.match[source];
      uint64_t mask = sources_of(to);
      if (__ffsll(static_cast<long long>(mask)) - 1 != source) continue;
      Chunk<T> destination = chunk_at(to, c);
      float own_weight = weight(to), total = own_weight, sum[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum[k] = destination[k] * own_weight;
      for_sources(mask, [&](int s) {
        float share = weight(k_m + s);
        Chunk<T> chunk = chunk_at(k_m + s, c);
        total += share;
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum[k] += chunk[k] * share;
      });
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum[k] /= total;
      write_chunk(Chunk<T>::of(sum), out + to * channels + c);
    }
  }

  // Slots and sizes: each part writes some, by its last warps, which have the least to merge.
  __device__ void write_slots() const {
    int64_t* slot = a.slot + image * tokens;
    float* out_size = static_cast<float*>(a.out_size) + image * k_m;
    for (int j = (kChannelThreads - 1 - thread) * kParts + part; j < tokens; j += kChannelThreads * kParts) {
      int from = memory.order[j];
      slot[from] = j < k_m ? j : j < k_p ? memory.match[j - k_m] : -1;
      if (j >= k_m) continue;
      float size = memory.size[from];
      for_sources(sources_of(j), [&](int s) {
        float added = memory.size[memory.order[k_m + s]];
        size += a.cosine_sizes ? added * memory.cosine[s] : added;
      });
      out_size[j] = size;
    }
  }
};

template <class T, int kParts>
__global__ void __launch_bounds__(kChannelThreads, 1)
    prune_merge_channels_kernel(PruneMergeArgs a, ChannelLayout layout) {
  typename ChannelBlock<T, kParts>::First first(a);
  ChannelBlock<T, kParts> block(a, layout);
  block.ask(first);
  block.sort();
  block.settle();
  block.compare();
  block.decide();
  block.merge();
  block.write_slots();
}

// --- launch

template <class T, int kParts>
ChannelLayout channel_layout(const PruneMergeArgs& a) {
  ChannelLayout layout{};
  layout.own = (static_cast<int>(a.channels) / Chunk<T>::kCount + kParts - 1) / kParts;
  layout.padded = (layout.own + 3) / 4 * 4;
  layout.stride = source_stride<T>(int64_t{layout.padded} * Chunk<T>::kCount);
  layout.x_stride = static_cast<int>(a.x.stride_token);
  layout.residual_stride = static_cast<int>(a.residual.stride_token);
  layout.tokens_on = kChannelThreads / layout.padded;
  layout.chunks_on = kChannelThreads % layout.padded;
  layout.residual_inside = a.residual.data != nullptr;
  if (layout.residual_inside && ChannelMemory<T, kParts>(nullptr, a, layout).bytes > shared_limit())
    layout.residual_inside = false;
  return layout;
}

// Calls run.template operator()<T, kParts>() with those of the call; `otherwise` where no kernel is compiled for them.
template <class Result, class Run>
Result with_channel_kernel(const PruneMergeArgs& a, int parts, Result otherwise, Run run) {
  auto with_parts = [&]<class T>() {
    switch (parts) {
      case 8: return run.template operator()<T, 8>();
      case 4: return run.template operator()<T, 4>();
      case 2: return run.template operator()<T, 2>();
      default: return otherwise;
    }
  };
  if (a.type == Type::f16) return with_parts.template operator()<__half>();
  if (a.type == Type::bf16) return with_parts.template operator()<__nv_bfloat16>();
  return otherwise;
}

inline bool channels_possible(const PruneMergeArgs& a, int parts) {
  int64_t sources = a.k_p - a.k_m;
  if (sources < 1 || sources > kChannelSources || a.tokens > kChannelThreads) return false;
  for (int64_t stride :
       {a.x.stride_token, a.residual.stride_token, a.channels})  // places in an image are 32-bit numbers
    if (stride > INT32_MAX / kChannelThreads || stride < 0) return false;
  return with_channel_kernel(a, parts, false, [&]<class T, int kParts>() {
    return all_aligned<T>(a) &&
           ChannelMemory<T, kParts>(nullptr, a, channel_layout<T, kParts>(a)).bytes <= shared_limit() &&
           has_clusters(prune_merge_channels_kernel<T, kParts>);
  });
}

// Where channels_possible.
inline const char* launch_channels(const PruneMergeArgs& a, int parts, Stream stream) {
  const char* otherwise = "no kernel for these channels";
  return with_channel_kernel(a, parts, otherwise, [&]<class T, int kParts>() {
    ChannelLayout layout = channel_layout<T, kParts>(a);
    return launch(prune_merge_channels_kernel<T, kParts>, Blocks(a.images * kParts, kParts), kChannelThreads,
                  ChannelMemory<T, kParts>(nullptr, a, layout).bytes, stream, a, layout);
  });
}

}  // namespace diffrate::cuda
