// The forms in which short_attention.cuh is compiled, and which one serves what.
//
// What is best depends on how many tiles of 16 rows share how many warps, and on how many blocks a multiprocessor
// holds: it was measured (benchmarks/tune_attention.py). DIFFRATE_ATTENTION_VARIANT overrides the choice.
#pragma once

#include <array>

#include "cuda/common.cuh"

namespace diffrate::cuda {

// What becomes of a chunk's logits.
enum class Softmax {
  checked,     // the largest are compared with the base, which may move; exponentials are added up
  added,       // exponentials, added up; whether the base was good shows at the end
  multiplied,  // the same, but the tensor cores add up what they multiply by: one more column of ones
};

struct ShortVariant {
  int tiles;      // of 16 rows that a warp works on at once
  int keys;       // that it works on at once
  int warps;      // of a block, at most
  int blocks;     // that a multiprocessor must hold: with `warps` it says how many registers there are
  bool swizzled;  // rows of shared memory: chunks permuted, or padding between them
  Softmax softmax;

  bool operator==(const ShortVariant&) const = default;
};

// Microseconds are of an H200, bf16, B = 256, H = 12, or 16 where D = 80, with sizes. "was": as a prototype, which kept
// the next rows' queries in registers and gave the uneven rest of the rows always to the same warps.
//
// Predictions. A logit costs a lane 4.5 instructions in `checked` (multiply-add, exponential, maximum, addition, half a
// conversion), 3.5 in `added` and 2.5 in `multiplied`, and 2.5 more are shared by all (2 of them matrix products, of
// which `multiplied` has 1/16 more): 14 % and 29 % less to issue. As issuing, the tensor cores (58 us of 172 at N =
// 197) and the exponentials (36) take turns rather than overlap, that is some 8 % and 15 % of the time. Besides,
// nothing waits for a vote: the first products with values start while other exponentials are under way. The rest of
// the rows by turns: N = 197 has 13 tiles for 4 warps, 4 + 4 + 3 + 2, so that two of four schedulers had 8 of 13 tiles:
// 10 %.
template <int kDepth>
inline constexpr auto kShortVariants = std::to_array<ShortVariant>({
    {1, 32, 4, 3, true, Softmax::multiplied},
    {1, 32, 6, 2, true, Softmax::multiplied},
});
template <>
inline constexpr auto kShortVariants<64> = std::to_array<ShortVariant>({
    {2, 32, 4, 3, false, Softmax::checked},     // was 172 at N = 197
    {2, 32, 4, 3, false, Softmax::added},       // 150
    {2, 32, 4, 3, false, Softmax::multiplied},  // 140
    {1, 32, 4, 4, true, Softmax::checked},      // was 133 at N = 168, 100 at N = 130
    {1, 32, 4, 4, true, Softmax::multiplied},   // 115, 90
    {1, 32, 5, 3, true, Softmax::multiplied},   // with `checked` was 68 at N = 100: 62
    {1, 32, 9, 2, true, Softmax::multiplied},   // with `checked` was 112 at N = 156, 35 at N = 64: 105, 33
    {1, 64, 6, 2, true, Softmax::multiplied},   // with `checked` was 6.7 at B = 1
    {1, 32, 7, 2, false, Softmax::multiplied},  // with `checked` was 185 at N = 197, 148 at N = 168: 150, 125
    {2, 32, 4, 3, true, Softmax::multiplied},
    {1, 32, 4, 4, true, Softmax::added},
    {1, 64, 4, 3, true, Softmax::multiplied},
});
template <>
inline constexpr auto kShortVariants<80> = std::to_array<ShortVariant>({
    {1, 32, 7, 2, false, Softmax::checked},     // was 288 at N = 200, 179 at N = 160
    {1, 32, 7, 2, false, Softmax::multiplied},  // 255, 160
    {1, 64, 6, 2, true, Softmax::checked},      // was 440 at N = 257
    {1, 64, 6, 2, true, Softmax::multiplied},   // 390
    {1, 32, 9, 2, true, Softmax::multiplied},   // with `checked` was 454 at N = 257: 400
    {1, 32, 5, 3, true, Softmax::multiplied},
});

// Heads whose tokens are so near each other that an offset is one multiplication.
struct ShortHeads {
  const void* data;
  int64_t stride_image, stride_head;
  int stride_token;
};

struct ShortAttentionArgs {
  ShortHeads q, k, v;
  Vector size;        // data may be null: all ones
  void* out;          // (B, N, H, D)
  float* class_rows;  // (B, H, N): the class token's attention; null: not wanted
  int heads, tokens, head_dim;
  int splits;           // blocks among which a head's rows are divided
  float scale;          // of logits as powers of two
  float inverse_scale;  // from powers of two to units of q k
};

__host__ __device__ inline int tiles_of(int tokens) { return (tokens + 15) / 16; }

// A block's shared memory.
struct ShortShared {
  unsigned char *keys, *values;  // SharedRows
  unsigned char* stages;         // of each warp, for a tile of rows on their way in or out
  float* bias;                   // of each two keys four numbers: both, twice, as a fragment has them
  float* class_row;
  int64_t bytes;

  __host__ __device__ ShortShared(unsigned char* memory, int stride, int padded, int warps) {
    Shared pieces(memory);
    keys = pieces.take<unsigned char>(padded * stride);
    values = pieces.take<unsigned char>(padded * stride);
    stages = pieces.take<unsigned char>(warps * 16 * stride);
    bias = pieces.take<float>(padded * 2);
    class_row = pieces.take<float>(padded);
    bytes = pieces.bytes();
  }
};

// A launch of a variant.
struct ShortLaunch {
  ShortAttentionArgs args;
  int64_t blocks, shared_bytes;
  int warps;
  Stream stream;
};

// `depth` is that of a list of variants. Compiled in a file for each dtype.
const char* launch_short_attention_f16(int depth, int variant, const ShortLaunch&);
const char* launch_short_attention_bf16(int depth, int variant, const ShortLaunch&);

// How short_attention would run.
struct ShortChoice {
  int depth = 0, variant = -1;  // no variant: not at all
  int splits = 1;
  const char* error = nullptr;  // in what the environment asks for
};
ShortChoice choose_short_attention(const AttentionArgs& a);

// proportional_attention, but for the mean over heads: `class_rows` is (B, H, N).
const char* short_attention(const AttentionArgs& a, const ShortChoice& choice, float* class_rows, Stream stream);

}  // namespace diffrate::cuda
