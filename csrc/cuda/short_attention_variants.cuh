// The forms in which short_attention.cuh is compiled, and which one serves what.
//
// What is best depends on how many tiles of 16 rows share how many warps, and on how many blocks a multiprocessor
// holds: it was measured (benchmarks/tune_attention.py). DIFFRATE_ATTENTION_VARIANT overrides the choice.
#pragma once

#include <array>

#include "cuda/common.cuh"

namespace diffrate::cuda {

struct ShortVariant {
  int tiles;         // of 16 rows that a warp works on at once
  int keys;          // that it works on at once
  int warps;         // of a block, at most
  int blocks;        // that a multiprocessor must hold: with `warps` it says how many registers there are
  bool swizzled;     // rows of shared memory: chunks permuted, or padding between them
  bool tensor_sums;  // the tensor cores add up the exponentials, with a column of ones; else additions do

  bool operator==(const ShortVariant&) const = default;
};

// Beside each: what it serves best, in microseconds on an H200 in bfloat16 with sizes and the class token's attention,
// at B = 256 and H = 12, or 16 where D = 80, unless said otherwise. Bytes alone take 74 at N = 197, 160 at N = 257.
// Tried and left: a running maximum that is compared with each chunk (202 at N = 197, 106 at N = 130, 658 at N = 257).
template <int kDepth>
inline constexpr auto kShortVariants = std::to_array<ShortVariant>({
    {1, 32, 4, 3, true, true},
    {1, 32, 6, 2, true, true},
});
template <>
inline constexpr auto kShortVariants<64> = std::to_array<ShortVariant>({
    {1, 32, 5, 3, true, true},    // N = 100: 73
    {1, 32, 7, 2, false, true},   // N = 130: 101, and 18.7 at B = 32; 8.3 at B = 1, N = 197
    {1, 32, 9, 2, true, true},    // N = 156: 114, N = 64: 40
    {1, 32, 4, 4, true, true},    // N = 168: 136
    {2, 32, 4, 3, false, false},  // N = 197: 167, and 30.7 at B = 32
    {1, 64, 6, 2, true, true},    // not measured where it serves
});
template <>
inline constexpr auto kShortVariants<80> = std::to_array<ShortVariant>({
    {1, 32, 7, 2, false, true},  // N = 160: 183, N = 200: 280; 11.4 at B = 1, N = 257
    {1, 64, 6, 2, true, true},   // N = 257: 415
    {1, 32, 5, 3, true, true},   // N = 160: 176
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
