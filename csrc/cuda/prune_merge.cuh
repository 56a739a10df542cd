// Sort, prune and merge in one launch: what prune_merge and masked_prune_merge share.
//
// An image has one thread block, or where there are fewer images than multiprocessors a cluster of them (`parts`). Each
// block sorts for itself (images of very many tokens are sorted by a launch before) and keeps the sources of the image
// (k_p - k_m tokens, few; if not, so many at a time) in shared memory. The destinations
// are shared out and stream by, eight to a warp: a row is read once, copied to the output and compared with all sources
// while it is in registers. At the end only the destinations that received a source are read again, from the output.
// Nothing depends on the order of blocks or warps.
#pragma once

#include <type_traits>

#include "cuda/ranking.cuh"

namespace diffrate::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDestinations = 8;       // of a warp at a time: a lane holds 16 bytes of the row of destination lane / 4
constexpr int64_t kNearTokens = 2048;  // with more, what each token needs is kept in device memory

constexpr int64_t kMostParts = 8;  // the largest cluster that every device has

// What is compared at once: as many sources as registers allow.
template <class T>
constexpr int kMostSources = sizeof(T) == 2   ? 64
                             : sizeof(T) == 4 ? 32
                                              : 16;

// How rows are read: 16 bytes at a time by lanes that have so many chunks under way, or number by number where rows are
// not aligned. Of many images two blocks on a multiprocessor hide each other's waiting; of few there is only one, which
// takes all registers to read ahead.
// Float and double, of which a lane has fewer sources to keep, always read as of many.
enum class Reading { many_images, few_images, unaligned };
template <Reading kReading>
constexpr int kReadAhead = kReading == Reading::many_images  ? 4
                           : kReading == Reading::few_images ? 8
                                                             : 1;
template <class T, Reading kReading>
constexpr int kBlocksAtOnce = sizeof(T) == 2 && kReading == Reading::many_images ? 2 : 1;

// What is kept for each token of an image: in shared memory, or in device memory where there are many tokens.
template <class W>
struct PerToken {
  int32_t* order;  // (N): the input position of each sorted position
  int32_t* match;  // (sources): the sorted position of the destination
  W* cosine;       // (sources): with that destination
};

// What one part of an image found for a source: the largest cosine, before division by the source's norm, and whose it
// is; of equal ones the first. -1: none.
template <class W>
struct Best {
  W cosine;
  int32_t position;

  __device__ void meet(Best other) {
    // a NaN is never larger, and a source that is similar to nothing has no destination
    bool first = other.cosine == cosine && other.position >= 0 && (position < 0 || other.position < position);
    if (other.cosine > cosine || first) *this = other;
  }
  __device__ void meet_lane(int offset) {
    W other = __shfl_xor_sync(kAllLanes, cosine, offset);
    meet({other, __shfl_xor_sync(kAllLanes, position, offset)});
  }
};

// Shared memory of a block.
template <class T>
struct ImageMemory {
  using W = Wide<T>;
  KeyOf<W>* keys;  // (N - P); these two only for images of at most kNearTokens
  PerToken<W> token;
  W* inverse;     // (resident): 1 / norm of each source
  Best<W>* best;  // (kWarps, kMostSources)
  T* sources;     // (resident, stride)
  int64_t bytes;

  __host__ __device__ ImageMemory(unsigned char* base, int64_t tokens, int resident, int stride)
      : keys(nullptr), token{} {
    Shared shared(base);
    if (tokens <= kNearTokens) {
      keys = shared.take<KeyOf<W>>(tokens);
      token.order = shared.take<int32_t>(tokens);
      token.match = shared.take<int32_t>(tokens);
      token.cosine = shared.take<W>(tokens);
    }
    inverse = shared.take<W>(kMostSources<T>);
    best = shared.take<Best<W>>(kWarps * kMostSources<T>);
    sources = shared.take<T>(static_cast<int64_t>(resident) * stride);
    bytes = shared.bytes();
  }
};

// How a launch is laid out.
template <class W>
struct Layout {
  int parts;          // blocks that share an image
  int stride;         // of a source in shared memory
  int resident;       // sources that fit there at once
  PerToken<W> far;    // device memory of all images, or null
  Best<W>* exchange;  // (B, parts, N): what the parts of an image tell each other, or null
};

// Four neighbouring lanes read 64 bytes of a row, and rows that lie 64 bytes from a multiple of 128 apart keep eight
// lanes in different banks.
template <class T>
int source_stride(int64_t channels) {
  int64_t bytes = (channels * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return static_cast<int>((bytes % 128 == 0 ? bytes + 64 : bytes) / static_cast<int64_t>(sizeof(T)));
}

template <class T, Reading kReading>
struct PruneMerge {
  using W = Wide<T>;
  static constexpr int kCount = Chunk<T>::kCount;
  static constexpr int kMost = kMostSources<T>;
  static constexpr int kAhead = kReadAhead<kReading>;
  static constexpr bool kAligned = kReading != Reading::unaligned;

  const PruneMergeArgs& a;
  int64_t k_m;         // the image's, whatever the arguments say
  int64_t out_tokens;  // rows of an image in `out`
  const Layout<W>& layout;
  int64_t image;
  int part;
  ImageMemory<T> memory;
  PerToken<W> token;
  int64_t sources;

  __device__ PruneMerge(const PruneMergeArgs& args, const Layout<W>& how, int64_t pruned, int64_t merged, int64_t rows)
      : a(args),
        k_m(merged),
        out_tokens(rows),
        layout(how),
        image(blockIdx.x / how.parts),
        part(static_cast<int>(blockIdx.x) % how.parts),
        memory(shared_memory(), args.tokens, how.resident, how.stride),
        token(memory.token),
        sources(pruned - merged) {
    if (how.far.order != nullptr)
      token = {how.far.order + image * a.tokens, how.far.match + image * a.tokens, how.far.cosine + image * a.tokens};
  }

  // The warps of all parts share out rows, the threads of all parts positions.
  __device__ int64_t first_warp() const { return part * kWarps + warp_id(); }
  __device__ int64_t all_warps() const { return static_cast<int64_t>(layout.parts) * kWarps; }
  __device__ int64_t first_thread() const { return static_cast<int64_t>(part) * kThreads + threadIdx.x; }
  __device__ int64_t all_threads() const { return static_cast<int64_t>(layout.parts) * kThreads; }

  __device__ T* out_row(int64_t position) const {
    return static_cast<T*>(a.out) + (image * out_tokens + position) * a.channels;
  }

  // A row of the input, and of the residual or null.
  struct Row {
    const T *x, *residual;
  };
  __device__ Row input_row(int64_t position) const {
    int64_t from = token.order[position];
    return {row_of<T>(a.x, image, from), a.residual.data == nullptr ? nullptr : row_of<T>(a.residual, image, from)};
  }

  // Chunks of rows, with the residual added as eager PyTorch would (rounded to T). All are asked for before the first
  // is used. `where(u)` gives the row and the channel of chunk u.
  template <int kChunks, class Where>
  __device__ void read_input(Chunk<T> (&chunk)[kChunks], Where where) const {
    Chunk<T> more[kChunks];
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      auto [row, c] = where(u);
      chunk[u] = load_chunk(row.x, c, a.channels, kAligned);
    }
    if (a.residual.data == nullptr) return;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      auto [row, c] = where(u);
      more[u] = load_chunk(row.residual, c, a.channels, kAligned);
    }
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      W sum[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] = chunk[u][i] + more[u][i];
      chunk[u] = Chunk<T>::of(sum);
    }
  }
  struct Place {
    Row row;
    int64_t c;
  };
  __device__ Chunk<T> input_chunk(const Row& row, int64_t c) const {
    Chunk<T> chunk[1];
    read_input(chunk, [&](int) { return Place{row, c}; });
    return chunk[0];
  }

  // Fills token.order, unless it came with the launch.
  __device__ void sort() const {
    if (a.tokens > kNearTokens) return;
    int patches = static_cast<int>(a.tokens - a.prefix);
    for (int j = static_cast<int>(threadIdx.x); j < patches; j += kThreads)
      memory.keys[j] = key_at<W>(a.importance, image, j);
    for (int j = static_cast<int>(threadIdx.x); j < a.prefix; j += kThreads) token.order[j] = j;
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < patches; j += kThreads)
      token.order[a.prefix + rank_of(memory.keys, patches, j)] = static_cast<int32_t>(a.prefix + j);
    __syncthreads();
  }

  __device__ void copy_token(int64_t position) const {
    Row row = input_row(position);
    for (int64_t c = lane_id() * kCount; c < a.channels; c += kWarp * kCount)
      store_chunk(input_chunk(row, c), out_row(position), c, a.channels, kAligned);
  }

  // Copies the tokens at the positions begin .. end-1.
  __device__ void copy_tokens(int64_t begin, int64_t end) const {
    for (int64_t position = begin + first_warp(); position < end; position += all_warps()) copy_token(position);
  }

  // Copies the destinations, and matches the sources with them.
  __device__ void match() const {
    for (int64_t first = 0; first < sources; first += layout.resident) {
      int count = static_cast<int>(sources - first < layout.resident ? sources - first : layout.resident);
      load_sources(first, count);
      compare(count, first == 0);
      __syncthreads();
      choose(first, count);
      __syncthreads();
    }
  }

  __device__ void load_sources(int64_t first, int count) const {
    int chunks = layout.stride / kCount, total = count * chunks;
    for (int begin = static_cast<int>(threadIdx.x); begin < total; begin += kAhead * kThreads) {
      Chunk<T> chunk[kAhead];
      read_input(chunk, [&](int u) {
        int i = begin + u * kThreads < total ? begin + u * kThreads : begin;
        return Place{input_row(k_m + first + i / chunks), i % chunks * kCount};
      });
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        int i = begin + u * kThreads;
        if (i < total) write_chunk(chunk[u], memory.sources + static_cast<int64_t>(i) * kCount);
      }
    }
    __syncthreads();
    for (int i = warp_id(); i < count; i += kWarps) {
      W squares = 0;
      for (int c = lane_id(); c < layout.stride; c += kWarp) {
        W value = to_wide(memory.sources[static_cast<int64_t>(i) * layout.stride + c]);
        squares += value * value;
      }
      squares = warp_sum(squares);
      if (lane_id() == 0) memory.inverse[i] = inverse_norm(squares);
    }
  }

  __device__ static W inverse_norm(W squares) {
    W norm = sqrt(squares);
    return 1 / (norm < W(kNormEpsilon) ? W(kNormEpsilon) : norm);
  }

  // Each warp compares some groups of destinations with all resident sources, and leaves the best it found in
  // memory.best. In the first pass it also writes the destinations.
  //
  // Source and destination meet channel by channel whatever the order of channels, so a lane's 16 bytes can stand for
  // any channels of the tensor cores' operands: no operand is ever rearranged. In half precision the tensor cores sum
  // over a row's four lanes; in float and double each lane sums over its own channels for every source, and the four
  // lanes' sums are added at the end.
  __device__ void compare(int count, bool first_pass) const {
    constexpr bool tensor_cores = sizeof(T) == 2;
    constexpr int kTiles = kMost / 16;
    constexpr int kHeld = tensor_cores ? 2 * kTiles : kMost / 4;  // sources whose best a lane keeps
    int group = lane_id() / 4, quarter = lane_id() % 4, channels = static_cast<int>(a.channels);
    Best<W> best[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) best[i] = {W(-INFINITY), -1};

    int64_t groups = (k_m - a.prefix + kDestinations - 1) / kDestinations;
    for (int64_t g = first_warp(); g < groups; g += all_warps()) {
      int64_t start = a.prefix + g * kDestinations, position = start + group;
      bool inside = position < k_m;
      if (!inside) position = start;
      Row from = input_row(position);
      T* to = out_row(position);
      W squares = 0;
      W sums[tensor_cores ? kTiles : kMost / 4][4] = {};
      for (int c0 = quarter * kCount; c0 < channels + quarter * kCount; c0 += kAhead * 4 * kCount) {
        Chunk<T> row[kAhead];
        if (first_pass) {
          read_input(row, [&](int u) { return Place{from, c0 + u * 4 * kCount}; });
        } else {  // what this lane has written
#pragma unroll
          for (int u = 0; u < kAhead; ++u) row[u] = load_chunk(to, c0 + u * 4 * kCount, a.channels, kAligned);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          int c = c0 + u * 4 * kCount;
          if (c - quarter * kCount >= channels) break;  // for all lanes at once
          if (first_pass && inside) store_chunk(row[u], to, c, a.channels, kAligned);
#pragma unroll
          for (int i = 0; i < kCount; ++i) squares += row[u][i] * row[u][i];
          multiply(row[u], c, count, sums);
        }
      }
      squares += __shfl_xor_sync(kAllLanes, squares, 1);
      squares += __shfl_xor_sync(kAllLanes, squares, 2);
      // past the last destination there is no cosine: NaN is never better
      W inverse = inside ? inverse_norm(squares) : not_a_number<W>();
      keep_best(sums, inverse, start, count, best);
    }
    leave_best(best, count);
  }

  // Adds the products of a lane's 16 bytes with the same channels of the sources.
  template <int kSums>
  __device__ void multiply(const Chunk<T>& row, int c, int count, W (&sums)[kSums][4]) const {
    if constexpr (sizeof(T) == 2) {
      const uint32_t* b = row.words;
      int top = lane_id() / 4, last = count - 1;
#pragma unroll
      for (int tile = 0; tile < kSums; ++tile) {
        if (tile * 16 >= count) break;
        // rows past the last source are the last one: what comes of them is not used
        int upper = tile * 16 + top, lower = upper + 8;
        Chunk<T> above = source_chunk(upper < last ? upper : last, c);
        Chunk<T> below = source_chunk(lower < last ? lower : last, c);
        const uint32_t even[4] = {above.words[0], below.words[0], above.words[1], below.words[1]};
        const uint32_t odd[4] = {above.words[2], below.words[2], above.words[3], below.words[3]};
        multiply_accumulate<T>(sums[tile], even, b[0], b[1]);
        multiply_accumulate<T>(sums[tile], odd, b[2], b[3]);
      }
    } else {
#pragma unroll
      for (int s = 0; s < kSums * 4; ++s) {
        if (s % 8 == 0 && s >= count) break;
        Chunk<T> source = source_chunk(s < count ? s : count - 1, c);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[s / 4][s % 4] += row[i] * source[i];
      }
    }
  }

  __device__ Chunk<T> source_chunk(int source, int c) const {
    return read_chunk(memory.sources + static_cast<int64_t>(source) * layout.stride + c);
  }

  template <int kSums, int kHeld>
  __device__ void keep_best(W (&sums)[kSums][4], W inverse, int64_t start, int count, Best<W> (&best)[kHeld]) const {
    int quarter = lane_id() % 4;
    if constexpr (sizeof(T) == 2) {
      // a lane has the sums of sources lane / 4 and lane / 4 + 8 with destinations 2 quarter and the next
      W left = __shfl_sync(kAllLanes, inverse, quarter * 8), right = __shfl_sync(kAllLanes, inverse, quarter * 8 + 4);
      int32_t here = static_cast<int32_t>(start) + quarter * 2;
#pragma unroll
      for (int tile = 0; tile < kSums; ++tile) {
        if (tile * 16 >= count) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          best[tile * 2 + half].meet({sums[tile][half * 2] * left, here});
          best[tile * 2 + half].meet({sums[tile][half * 2 + 1] * right, here + 1});
        }
      }
    } else {
      int32_t here = static_cast<int32_t>(start) + lane_id() / 4;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (i * 4 >= count) break;
        W mine = 0;  // lane `quarter` takes source 4 i + quarter
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          W sum = sums[i][j];
          sum += __shfl_xor_sync(kAllLanes, sum, 1);
          sum += __shfl_xor_sync(kAllLanes, sum, 2);
          if (j == quarter) mine = sum;
        }
        best[i].meet({mine * inverse, here});
      }
    }
  }

  template <int kHeld>
  __device__ void leave_best(Best<W> (&best)[kHeld], int count) const {
    constexpr bool tensor_cores = sizeof(T) == 2;
    int group = lane_id() / 4, quarter = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      // the lanes that met other destinations of the same sources
      for (int offset = tensor_cores ? 1 : 4; offset < (tensor_cores ? 4 : kWarp); offset *= 2)
        best[i].meet_lane(offset);
      int source = tensor_cores ? i / 2 * 16 + i % 2 * 8 + group : i * 4 + quarter;
      if (source < count && (tensor_cores ? quarter : group) == 0) memory.best[warp_id() * kMost + source] = best[i];
    }
  }

  // Chooses among the destinations that warps and parts found.
  __device__ void choose(int64_t first, int count) const {
    Best<W>* told = layout.parts == 1 ? nullptr : layout.exchange + image * layout.parts * a.tokens + first;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      Best<W> best = memory.best[i];
      for (int warp = 1; warp < kWarps; ++warp) best.meet(memory.best[warp * kMost + i]);
      if (told == nullptr)
        settle(first, i, best);
      else
        told[part * a.tokens + i] = best;
    }
    if (told == nullptr) return;
    cluster_barrier();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      Best<W> best = told[i];
      for (int other = 1; other < layout.parts; ++other) best.meet(told[other * a.tokens + i]);
      settle(first, i, best);
    }
  }

  __device__ void settle(int64_t first, int i, Best<W> best) const {
    // a source that is similar to nothing (NaN features) goes to the first destination
    bool none = best.position < 0;
    token.match[first + i] = none ? static_cast<int32_t>(a.prefix) : best.position;
    token.cosine[first + i] = none ? not_a_number<W>() : best.cosine * memory.inverse[i];
  }

  __device__ W size_at(int64_t position) const { return size_of<W>(a.size, image, token.order[position]); }

  // What a source counts for when sizes add up.
  __device__ W size_of_source(int64_t source) const {
    W size = size_at(k_m + source);
    return a.cosine_sizes ? size * token.cosine[source] : size;
  }

  __device__ W weight(int64_t position) const {
    W size = a.weighted ? size_at(position) : W(1);
    return size > W(kTinySize) ? size : W(kTinySize);
  }

  // Gives each destination the mean over itself and its sources: a warp for each, the one at its first source.
  __device__ void merge() const {
    bool resident = sources <= layout.resident;
    for (int64_t source = first_warp(); source < sources; source += all_warps()) {
      int32_t to = token.match[source];
      if (matched_before(source, to)) continue;
      W own = weight(to), total = own;
      for_matched(source, to, [&](int64_t i) { total += weight(k_m + i); });
      for (int64_t first = 0; first < a.channels; first += kWarp * kCount) {
        int64_t c = first + lane_id() * kCount;
        Chunk<T> mean = load_chunk(out_row(to), c, a.channels, kAligned);
        W sum[kCount];
        for (int i = 0; i < kCount; ++i) sum[i] = mean[i] * own;
        for_matched(source, to, [&](int64_t i) {
          W share = weight(k_m + i);
          Chunk<T> more = !resident           ? input_chunk(input_row(k_m + i), c)
                          : c < layout.stride ? source_chunk(static_cast<int>(i), static_cast<int>(c))
                                              : Chunk<T>{};
          for (int j = 0; j < kCount; ++j) sum[j] += more[j] * share;
        });
        for (int i = 0; i < kCount; ++i) sum[i] /= total;
        store_chunk(Chunk<T>::of(sum), out_row(to), c, a.channels, kAligned);
      }
    }
  }

  // Whether a source before this one has the same destination; by a whole warp.
  __device__ bool matched_before(int64_t source, int32_t to) const {
    bool found = false;
    for (int64_t i = lane_id(); i < source; i += kWarp) found = found || token.match[i] == to;
    return __ballot_sync(kAllLanes, found) != 0;
  }

  // Calls body(source), by a whole warp, for the sources from `first` on that go to `to`, in ascending order.
  template <class Body>
  __device__ void for_matched(int64_t first, int32_t to, Body body) const {
    for (int64_t begin = first; begin < sources; begin += kWarp) {
      int64_t i = begin + lane_id();
      unsigned left = __ballot_sync(kAllLanes, i < sources && token.match[i] == to);
      for (; left != 0; left &= left - 1) body(begin + __ffs(left) - 1);
    }
  }
};

// Sorts images of more than kNearTokens.
template <class W>
__global__ void __launch_bounds__(kRankingThreads) order_kernel(PruneMergeArgs a, int32_t* order) {
  for_ranked_tokens<W>(a.importance, a.tokens, a.prefix, [&](int64_t image, int64_t token, int64_t position) {
    if (lane_id() == 0) order[image * a.tokens + position] = static_cast<int32_t>(token);
  });
}

// How many blocks share an image: where images are few, so many that most multiprocessors have one.
inline int parts_of(const PruneMergeArgs& a) {
  int64_t parts = 1, most = multiprocessors();
  while (parts < kMostParts && a.images * parts * 2 <= most) parts *= 2;
  return parts == 1 || has_clusters(order_kernel<float>) ? static_cast<int>(parts) : 1;
}

// Device memory: what each token needs where they are many, and what the parts of an image tell each other.
inline int64_t scratch_bytes_of(const PruneMergeArgs& a) {
  int64_t all = a.images * a.tokens, parts = parts_of(a);
  int64_t far = a.tokens > kNearTokens ? all * static_cast<int64_t>(sizeof(double) + 2 * sizeof(int32_t)) : 0;
  return far + (parts > 1 ? all * parts * static_cast<int64_t>(sizeof(Best<double>)) : 0);
}

// Where sources number at most `most`. `error` tells what cannot be done.
template <class T>
Layout<Wide<T>> layout_of(const PruneMergeArgs& a, int64_t most, void* scratch, const char*& error) {
  using W = Wide<T>;
  Layout<W> layout{};
  layout.parts = parts_of(a);
  layout.stride = source_stride<T>(a.channels);
  int64_t row =
      ImageMemory<T>(nullptr, a.tokens, 1, layout.stride).bytes - ImageMemory<T>(nullptr, a.tokens, 0, 0).bytes;
  int64_t room = shared_limit() - ImageMemory<T>(nullptr, a.tokens, 0, 0).bytes;
  int64_t resident = most < kMostSources<T> ? most : kMostSources<T>;
  if (resident * row > room) resident = room / row;
  if (resident == 0 && most > 0) error = "a token has more channels than the CUDA kernels can keep in shared memory";
  layout.resident = static_cast<int>(resident);
  // the widest first, so that all are aligned
  int64_t all = a.images * a.tokens;
  layout.exchange = static_cast<Best<W>*>(scratch);
  if (a.tokens <= kNearTokens) return layout;
  layout.far.cosine = reinterpret_cast<W*>(layout.exchange + (layout.parts > 1 ? all * layout.parts : 0));
  layout.far.order = reinterpret_cast<int32_t*>(layout.far.cosine + all);
  layout.far.match = layout.far.order + all;
  return layout;
}

template <class T>
bool all_aligned(const PruneMergeArgs& a) {
  auto aligned = [&](const Tokens& x) { return aligned_rows<T>(x.data, a.channels, x.stride_image, x.stride_token); };
  return aligned(a.x) && (a.residual.data == nullptr || aligned(a.residual)) && aligned({a.out, 0, 0});
}

// Calls run(T{}, reading, blocks, bytes of shared memory, layout), with the sort order of large images ready. Sources
// number at most `most`.
template <class Run>
const char* with_layout(const PruneMergeArgs& a, int64_t most, void* scratch, void* stream, Run run) {
  if (a.tokens == 0) return nullptr;
  return dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    using W = Wide<T>;
    const char* error = nullptr;
    Layout<W> layout = layout_of<T>(a, most, scratch, error);
    if (error == nullptr && layout.far.order != nullptr)
      error = launch(order_kernel<W>, ranking_blocks(a.images, a.tokens), kRankingThreads,
                     ranking_shared_bytes<W>(a.tokens), static_cast<Stream>(stream), a, layout.far.order);
    if (error != nullptr) return error;
    Blocks blocks(a.images * layout.parts, layout.parts);
    int64_t shared = ImageMemory<T>(nullptr, a.tokens, layout.resident, layout.stride).bytes;
    auto with = [&](auto reading) { return run(example, reading, blocks, shared, layout); };
    if (!all_aligned<T>(a)) return with(std::integral_constant<Reading, Reading::unaligned>{});
    if constexpr (sizeof(T) == 2)  // wide rows have enough under way
      if (layout.parts > 1) return with(std::integral_constant<Reading, Reading::few_images>{});
    return with(std::integral_constant<Reading, Reading::many_images>{});
  });
}

}  // namespace diffrate::cuda
