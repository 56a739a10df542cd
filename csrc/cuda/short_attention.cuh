// Attention whose keys and values fit shared memory: the forward pass for the sequences of vision transformers.
//
// A block holds all keys and values of one head of one image, padded to a multiple of 16, and its warps work on the
// queries, some tiles of 16 rows at a time, with the softmax brought up to date from chunk to chunk of keys. After the
// copies have arrived there is no barrier. Logits are in units of q k: what a key's size adds is where its sums start,
// and so costs nothing. A block has all rows of its head, or, where heads are few, `splits` blocks share them.
//
// For each chunk of keys a warp takes these steps: score, write_class_logits, weigh, accumulate. What is taken off the
// logits, the base, is the largest of the first chunk. Later ones may exceed it by far: only if the sums end beyond
// what the number formats are good for, the warp does its rows again, carefully, with a base that follows.
#pragma once

#include "cuda/short_attention_config.cuh"

namespace diffrate::cuda {

template <class C>
struct ShortPass {
  using T = typename C::T;
  using Rows = typename C::Rows;
  static constexpr int kSteps = C::kSteps, kDepth = C::kDepth, kStride = Rows::kStride;
  static constexpr ShortVariant kVariant = C::kVariant;

  template <int kTiles>
  using Queries = uint32_t[kTiles][kSteps][4];  // fragments
  template <int kTiles>
  using RawQueries = Chunk<T>[kTiles][kSteps];  // as they lie in memory, whole chunks
  template <int kTiles, int kKeys>
  using Logits = float[kTiles][kKeys / 8][4];
  template <int kTiles, int kKeys>
  using Weights = uint32_t[kTiles][kKeys / 16][4];  // fragments

  const ShortAttentionArgs& a;
  const int lane, warp, warps, tokens, padded;
  const int image_head, image, head;
  ShortShared shared;
  unsigned char* stage;                // of this warp
  const int key_offset, value_offset;  // of this lane's row of the first matrices
  const SharedAddress keys_at, values_at;
  const float* bias_of_lane;
  bool values_are_there = false;

  __device__ __forceinline__ explicit ShortPass(const ShortAttentionArgs& args)
      : a(args),
        lane(lane_id()),
        warp(warp_id()),
        warps(warps_in_block()),
        tokens(args.tokens),
        padded(tiles_of(args.tokens) * 16),
        image_head(static_cast<int>(blockIdx.x / static_cast<unsigned>(args.splits))),
        image(static_cast<int>(static_cast<unsigned>(image_head) / static_cast<unsigned>(args.heads))),
        head(image_head - image * args.heads),
        shared(shared_memory(), kStride, padded, warps),
        stage(shared.stages + warp * C::kStage),
        key_offset(Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)),
        value_offset(Rows::offset(lane % 16, lane / 16)),
        keys_at(shared_address(shared.keys)),
        values_at(shared_address(shared.values)),
        bias_of_lane(shared.bias + lane % 4 * 4) {}

  // --- what goes round: groups of tiles of rows

  __device__ int groups() const { return (padded / 16 + kVariant.tiles - 1) / kVariant.tiles; }
  __device__ int groups_at_once() const { return warps * a.splits; }
  // The warp's first group. Warps that have one more of them are others in other blocks: warp i of every block runs on
  // the same one of the multiprocessor's four schedulers.
  __device__ int first_group() const {
    const unsigned turn = blockIdx.x * 2654435769u >> 16;  // multiples of the golden ratio: neighbours differ most
    const int turned = warp + static_cast<int>(turn * static_cast<unsigned>(warps) >> 16);
    const int split = static_cast<int>(blockIdx.x) - image_head * a.splits;
    return split * warps + (turned < warps ? turned : turned - warps);
  }

  // --- copies

  // A tile of rows between memory and fragments: a lane has kSteps chunks of it.
  struct Place {
    int row, chunk;
  };
  __device__ static Place place_of(int own_lane, int j) {
    if constexpr (kWarp % Rows::kChunks == 0)
      return {own_lane / Rows::kChunks + j * (kWarp / Rows::kChunks), own_lane % Rows::kChunks};
    else
      return {(own_lane + j * kWarp) / Rows::kChunks, (own_lane + j * kWarp) % Rows::kChunks};
  }
  // The lane, but what follows from it is computed anew.
  __device__ int lane_anew() const { return static_cast<int>(static_cast<unsigned>(opaque(lane)) % kWarp); }

  // A thread copies one column of chunks, so that little is left to compute from row to row.
  __device__ __forceinline__ void fetch(const ShortHeads& from, unsigned char* to) const {
    const int tid = static_cast<int>(threadIdx.x);
    const int rows_at_once = static_cast<int>(blockDim.x) / Rows::kChunks;
    const int chunk = tid % Rows::kChunks, first = tid / Rows::kChunks;
    if (first < rows_at_once) {
      const int rows = chunk * 8 < a.head_dim ? tokens : 0;  // what follows is zero
      const T* source = head_start(from) + static_cast<int64_t>(first) * from.stride_token + chunk * 8;
      const int64_t step = static_cast<int64_t>(rows_at_once) * from.stride_token;
      const SharedAddress start = shared_address(to);
      int row = first;
#pragma unroll 4
      for (; row < rows; row += rows_at_once, source += step)
        copy_async(start + Rows::offset(row, chunk), source, true);
      for (; row < padded; row += rows_at_once)
        write_chunk(Chunk<T>{}, reinterpret_cast<T*>(to + Rows::offset(row, chunk)));
    }
    copy_commit();
  }

  __device__ __forceinline__ void put_bias() const {
    for (unsigned j = threadIdx.x; j < static_cast<unsigned>(padded); j += blockDim.x) {
      const float bias = bias_of_key<float>(a.size, image, j, tokens) * a.inverse_scale;
      shared.bias[j / 2 * 4 + j % 2] = bias;
      shared.bias[j / 2 * 4 + j % 2 + 2] = bias;
    }
  }

  // Keys have been waited for, values not: they are needed later.
  __device__ void wait_for_values() {
    if (values_are_there) return;
    copy_wait<0>();
    barrier_of_warps();  // warps with rows come from their first product, others do not
    values_are_there = true;
  }

  __device__ const T* head_start(const ShortHeads& from) const {
    return static_cast<const T*>(from.data) + image * from.stride_image + head * from.stride_head;
  }
  __device__ int64_t query_offset(int row) const {
    return static_cast<int64_t>(row < tokens ? row : tokens - 1) * a.q.stride_token;
  }
  // Past the last token or channel the last one is read again: such rows are not written, such channels meet zeros.
  __device__ __forceinline__ void read_queries(int group, RawQueries<kVariant.tiles>& to) const {
    const int own = lane_anew(), last = a.head_dim / 8 - 1;
    const T* start = head_start(a.q);
#pragma unroll
    for (int r = 0; r < kVariant.tiles; ++r)
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const Place place = place_of(own, j);
        const int chunk = place.chunk < last ? place.chunk : last;
        to[r][j] = read_chunk(start + query_offset((group * kVariant.tiles + r) * 16 + place.row) + chunk * 8);
      }
  }
  // Else registers would hold them all the time, for a next round that there is not.
  __device__ __forceinline__ static void forget(RawQueries<kVariant.tiles>& raw) {
#pragma unroll
    for (int r = 0; r < kVariant.tiles; ++r)
#pragma unroll
      for (int j = 0; j < kSteps; ++j) raw[r][j] = {};
  }
  // The queries of the warp's later groups, into the cache: they are read when it comes to them.
  __device__ __forceinline__ void prefetch_queries(int group) const {
    for (; group < groups(); group += groups_at_once())
      if (lane < kVariant.tiles * 16) {
        const T* row = head_start(a.q) + query_offset(group * kVariant.tiles * 16 + lane);
        prefetch(row);
        if constexpr (kDepth > 64) prefetch(row + a.head_dim - 8);
      }
  }

  template <int kTiles>
  __device__ __forceinline__ void to_fragments(const RawQueries<kVariant.tiles>& raw, Queries<kTiles>& queries) const {
    const int own = lane_anew();
    const SharedAddress row = shared_address(stage);
    const int offset = Rows::offset(own % 16, own / 16);
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const Place place = place_of(own, j);
        write_chunk(raw[r][j], reinterpret_cast<T*>(stage + Rows::offset(place.row, place.chunk)));
      }
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_matrices(queries[r][k], row + Rows::step(offset, k));
      __syncwarp();
    }
  }

  // --- one chunk of kKeys keys, from `first` on

  // All that repeats, in one piece, so that products overlap with exponentials.
  template <int kKeys, int kTiles>
  __device__ __forceinline__ void attend(const Queries<kTiles>& queries, int first, bool has_class_row,
                                         ShortRows<C, kTiles>& rows) {
    Logits<kTiles, kKeys> s;
    score<kKeys>(queries, first, s);
    if (has_class_row) write_class_logits<kKeys>(first, s[0]);
    Weights<kTiles, kKeys> weights;
    weigh<kKeys>(s, rows, weights);
    accumulate<kKeys>(first, weights, rows);
  }

  // The same with a base that follows: for the first chunk, and for all of them where it turned out to be needed.
  template <int kKeys, int kTiles>
  __device__ __forceinline__ void attend_carefully(const Queries<kTiles>& queries, int first, bool has_class_row,
                                                   ShortRows<C, kTiles>& rows) {
    Logits<kTiles, kKeys> s;
    score<kKeys>(queries, first, s);
    if (has_class_row) write_class_logits<kKeys>(first, s[0]);
    raise_base<kKeys>(first, s, rows);
    Weights<kTiles, kKeys> weights;
    weigh_exactly<kKeys>(s, rows, weights);
    wait_for_values();
    accumulate<kKeys>(first, weights, rows);
  }

  template <int kKeys, int kTiles>
  __device__ __forceinline__ void score(const Queries<kTiles>& queries, int first, Logits<kTiles, kKeys>& s) const {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float4 bias = *reinterpret_cast<const float4*>(bias_of_lane + first * 2 + n * 16);
#pragma unroll
      for (int r = 0; r < kTiles; ++r)
        s[r][n][0] = bias.x, s[r][n][1] = bias.y, s[r][n][2] = bias.z, s[r][n][3] = bias.w;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2)
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t b[4];
        load_matrices(b, keys_at + Rows::step(key_offset, k) + (first + n * 8) * kStride);
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
          multiply_add<T>(s[r][n], queries[r][k], b[0], b[1], s[r][n]);
          multiply_add<T>(s[r][n + 1], queries[r][k], b[2], b[3], s[r][n + 1]);
        }
      }
  }

  template <int kKeys>
  __device__ __forceinline__ void write_class_logits(int first, const float (&s)[kKeys / 8][4]) const {
    if (lane >= 4) return;
    for_columns<kKeys / 8>([&](int n, int i) { shared.class_row[first + n * 8 + lane * 2 + i] = s[n][i]; });
  }

  // By which power of two a logit weighs.
  template <int kTiles>
  struct Exponent {
    float scale, shift[kTiles][2];
    __device__ __forceinline__ Exponent(float scale_of_logits, const ShortRows<C, kTiles>& rows)
        : scale(scale_of_logits) {
      for_rows<kTiles>([&](int r, int h) { shift[r][h] = -rows.base[r][h] * scale; });
    }
    __device__ __forceinline__ float operator()(float logit, int r, int h) const { return logit * scale + shift[r][h]; }
  };

  // From logits to weights, by the base that there is.
  template <int kKeys, int kTiles>
  __device__ __forceinline__ void weigh(const Logits<kTiles, kKeys>& s, ShortRows<C, kTiles>& rows,
                                        Weights<kTiles, kKeys>& weights) const {
    exponentials<kKeys>(s, weights, rows, Exponent<kTiles>(a.scale, rows));
  }

  // The same by a base that no logit exceeds: with a difference, which is exact where logits are so large that the
  // product by itself would be far off.
  template <int kKeys, int kTiles>
  __device__ __forceinline__ void weigh_exactly(const Logits<kTiles, kKeys>& s, ShortRows<C, kTiles>& rows,
                                                Weights<kTiles, kKeys>& weights) const {
    exponentials<kKeys>(s, weights, rows,
                        [&](float logit, int r, int h) { return (logit - rows.base[r][h]) * a.scale; });
  }

  template <int kKeys, int kTiles, class OfLogit>
  __device__ __forceinline__ void exponentials(const Logits<kTiles, kKeys>& s, Weights<kTiles, kKeys>& weights,
                                               ShortRows<C, kTiles>& rows, const OfLogit& exponent) const {
    for_rows<kTiles>([&](int r, int h) {
      float even = 0, odd = 0;  // summed by themselves first: short sums round less
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const float low = power_of_two(exponent(s[r][n][2 * h], r, h));
        const float high = power_of_two(exponent(s[r][n][2 * h + 1], r, h));
        even += low;
        odd += high;
        weights[r][n / 2][n % 2 * 2 + h] = pack<T>(low, high);
      }
      if constexpr (!C::kTensorSums) rows.part_sum(r, h) += even + odd;
    });
  }

  template <int kKeys>
  __device__ __forceinline__ static float highest(const float (&s)[kKeys / 8][4], int h) {
    float most = fmaxf(s[0][2 * h], s[0][2 * h + 1]);  // of a number and NaN the number
#pragma unroll
    for (int n = 1; n < kKeys / 8; ++n) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    return most;
  }

  // Raises the base to the largest logit, and scales what was summed with the old one: nothing yet before key 0.
  template <int kKeys, int kTiles>
  __device__ __forceinline__ void raise_base(int first, const Logits<kTiles, kKeys>& s,
                                             ShortRows<C, kTiles>& rows) const {
    float factor[kTiles][2];
    for_rows<kTiles>([&](int r, int h) {
      const float next = fmaxf(rows.base[r][h], row_max(highest<kKeys>(s[r], h)));
      factor[r][h] = power_of_two((rows.base[r][h] - next) * a.scale);
      rows.base[r][h] = next;
    });
    if (first == 0) return;
    for_rows<kTiles>([&](int r, int h) {
      rows.part_sum(r, h) *= factor[r][h];
      for_columns<kDepth / 8>([&](int n, int i) { rows.out[r][n][2 * h + i] *= factor[r][h]; });
    });
  }

  template <int kKeys, int kTiles>
  __device__ __forceinline__ void accumulate(int first, const Weights<kTiles, kKeys>& weights,
                                             ShortRows<C, kTiles>& rows) const {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kDepth / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, values_at + Rows::step(value_offset, n / 2) + (first + k * 16) * kStride);
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
          multiply_add<T>(rows.out[r][n], weights[r][k], b[0], b[1], rows.out[r][n]);
          multiply_add<T>(rows.out[r][n + 1], weights[r][k], b[2], b[3], rows.out[r][n + 1]);
        }
      }
      if constexpr (C::kTensorSums) {
#pragma unroll
        for (int r = 0; r < kTiles; ++r) multiply_add<T>(rows.sum[r], weights[r][k], C::kOnes, C::kOnes, rows.sum[r]);
      }
    }
  }

  // --- after the last key

  // The softmax of the class token's logits, by itself: they are few, and its sum must not be one of rounded weights.
  __device__ __forceinline__ void write_class_row() const {
    __syncwarp();  // other lanes have written the logits
    const int own = lane_anew();
    float* row = shared.class_row;
    float top = -FLT_MAX, sum = 0;
#pragma unroll 1
    for (int j = own; j < tokens; j += kWarp) top = fmaxf(top, row[j]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
#pragma unroll 1
    for (int j = own; j < tokens; j += kWarp) sum += row[j] = power_of_two((row[j] - top) * a.scale);
    const float inverse = reciprocal(warp_sum(sum));
    float* to = a.class_rows + static_cast<int64_t>(image_head) * tokens;
#pragma unroll 1
    for (int j = own; j < tokens; j += kWarp) to[j] = row[j] * inverse;
  }

  template <int kTiles>
  __device__ __forceinline__ void write_out(int group, ShortRows<C, kTiles>& rows) const {
    const int own = lane_anew();
    const int row_length = a.heads * a.head_dim;
    T* start = static_cast<T*>(a.out) + static_cast<int64_t>(image) * tokens * row_length + head * a.head_dim;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = rows.part_sum(r, h), inverse = reciprocal(C::kTensorSums ? sum : row_sum(sum));
#pragma unroll
        for (int n = 0; n < kDepth / 8; ++n)
          *reinterpret_cast<uint32_t*>(stage + Rows::offset(own / 4 + h * 8, n) + own % 4 * 4) =
              pack<T>(rows.out[r][n][2 * h] * inverse, rows.out[r][n][2 * h + 1] * inverse);
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const Place place = place_of(own, j);
        const int token = (group * kVariant.tiles + r) * 16 + place.row;
        const Chunk<T> chunk = read_chunk(reinterpret_cast<const T*>(stage + Rows::offset(place.row, place.chunk)));
        const bool inside = (token < tokens) & (place.chunk * 8 < a.head_dim);  // one condition, no branch
        if (inside) write_chunk(chunk, start + static_cast<int64_t>(token) * row_length + place.chunk * 8);
      }
      __syncwarp();
    }
  }

  // Whether all sums of the warp's rows are good, and none is infinite or not a number.
  template <int kTiles>
  __device__ __forceinline__ static bool all_trusted(ShortRows<C, kTiles>& rows) {
    bool trusted = true;
    for_rows<kTiles>([&](int r, int h) { trusted &= rows.part_sum(r, h) <= C::kTrustedSum; });
    return __ballot_sync(kAllLanes, !trusted) == 0;
  }

  // --- a group of rows

  // Whether there are `count` more keys, padding included: first + count <= padded, in what needs no register.
  __device__ bool has_keys(int first, int count) const { return first + count - 15 <= a.tokens; }

  template <int kTiles>
  __device__ __forceinline__ void work(int group, const RawQueries<kVariant.tiles>& raw) {
    const bool has_class_row = group == 0 && a.class_rows != nullptr;
    Queries<kTiles> queries;
    to_fragments<kTiles>(raw, queries);
    for (int careful = 16;; careful = padded) {
      ShortRows<C, kTiles> rows;
      int first = 0;
#pragma unroll 1
      for (; first < careful; first += 16) attend_carefully<16>(queries, first, has_class_row, rows);
#pragma unroll 1
      for (; has_keys(first, kVariant.keys); first += kVariant.keys)
        attend<kVariant.keys>(queries, first, has_class_row, rows);
      if constexpr (kVariant.keys > 16) {
#pragma unroll 1
        for (; has_keys(first, 16); first += 16) attend<16>(queries, first, has_class_row, rows);
      }
      if (careful < padded && !all_trusted(rows)) continue;  // once more
      if (has_class_row) write_class_row();
      write_out<kTiles>(group, rows);
      return;
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kVariant.warps* kWarp, C::kVariant.blocks)
    short_attention_kernel(ShortAttentionArgs a) {
  ShortPass<C> pass(a);
  typename ShortPass<C>::template RawQueries<C::kVariant.tiles> raw = {};
  const int groups = pass.groups(), at_once = pass.groups_at_once();
  int group = pass.first_group();
  if (group < groups) pass.read_queries(group, raw);
  pass.fetch(a.k, pass.shared.keys);
  pass.fetch(a.v, pass.shared.values);
  pass.prefetch_queries(group + at_once);
  pass.put_bias();
  copy_wait<1>();
  __syncthreads();  // keys and bias are there
#pragma unroll 1
  while (group < groups) {
    if (C::kVariant.tiles > 1 && group * C::kVariant.tiles + 1 == pass.padded / 16)  // one tile is left
      pass.template work<1>(group, raw);
    else
      pass.template work<C::kVariant.tiles>(group, raw);
    group += at_once;
    if (group < groups)
      pass.read_queries(group, raw);
    else
      pass.forget(raw);
  }
  pass.wait_for_values();  // a warp without rows: the others wait for all
}

template <class T, int kDepth, int kIndex = 0>
const char* launch_short_variant(int variant, const ShortLaunch& l) {
  if constexpr (kIndex < static_cast<int>(kShortVariants<kDepth>.size())) {
    if (variant != kIndex) return launch_short_variant<T, kDepth, kIndex + 1>(variant, l);
    auto kernel = short_attention_kernel<ShortConfig<T, kDepth, kShortVariants<kDepth>[kIndex]>>;
    prefer_shared_memory(kernel);
    return launch(kernel, l.blocks, l.warps * kWarp, l.shared_bytes, l.stream, l.args);
  } else {
    return "no such variant of attention";
  }
}

template <class T>
const char* launch_short_depth(int depth, int variant, const ShortLaunch& l) {
  switch (depth) {
    case 32: return launch_short_variant<T, 32>(variant, l);
    case 64: return launch_short_variant<T, 64>(variant, l);
    case 80: return launch_short_variant<T, 80>(variant, l);
    default: return launch_short_variant<T, 128>(variant, l);
  }
}

}  // namespace diffrate::cuda
