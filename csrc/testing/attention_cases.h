// Inputs of the tests of attention kernels on the emulated device. Every buffer is exactly as long as it must be, for
// the sanitizers, and what lies between the numbers that count is NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "common/limits.h"
#include "cuda/common.cuh"
#include "testing/cuda_kernels.h"

namespace diffrate::cuda {

using emulation::Order;

inline const emulation::Schedule kSchedules[] = {{Order::forward, 0}, {Order::reverse, 0}, {Order::random, 1}};

using testing::check;
using testing::exact;

template <class T>
constexpr Type kType = std::is_same_v<T, float>    ? Type::f32
                       : std::is_same_v<T, double> ? Type::f64
                       : std::is_same_v<T, __half> ? Type::f16
                                                   : Type::bf16;

template <class T>
constexpr int64_t kWidestHead = most_head_channels(kType<T>);

// What one rounding to T does to a number of magnitude 1, at most.
template <class T>
constexpr double kRounding = std::is_same_v<T, float>    ? 0x1p-24
                             : std::is_same_v<T, double> ? 0x1p-53
                             : std::is_same_v<T, __half> ? 0x1p-11
                                                         : 0x1p-8;

enum class Layout { contiguous, packed, unaligned };
enum class Mask { zeros, ones, fractions };

struct Case {
  int64_t images, heads, tokens, head_dim;
  Layout layout;
  Mask mask;
  bool sizes;
  double gradient = 1;  // magnitude

  std::string name() const {
    const char* layouts[] = {"contiguous", "packed", "unaligned"};
    const char* masks[] = {"zeros", "ones", "fractions"};
    return "B = " + std::to_string(images) + ", H = " + std::to_string(heads) + ", N = " + std::to_string(tokens) +
           ", D = " + std::to_string(head_dim) + ", " + layouts[int(layout)] + ", mask of " + masks[int(mask)] +
           (sizes ? ", sizes" : "") + ", gradients of " + std::to_string(gradient);
  }
};

// The arguments of a case, and what they point to.
template <class T>
struct Inputs {
  using W = Wide<T>;
  AttentionArgs args{};
  std::vector<std::unique_ptr<T[]>> features;
  std::unique_ptr<W[]> mask, size;
  std::mt19937 random;

  explicit Inputs(const Case& c, unsigned seed) : random(seed) {
    args.type = kType<T>;
    args.images = c.images;
    args.heads = c.heads;
    args.tokens = c.tokens;
    args.head_dim = c.head_dim;
    args.scale = seed % 3 == 0 ? -0.7 : 1.5 / std::sqrt(double(c.head_dim));
    int64_t token = c.heads * c.head_dim, image = c.tokens * token;
    if (c.layout == Layout::packed) {
      T* memory = add(3 * c.images * image);
      Heads* heads[] = {&args.q, &args.k, &args.v};
      for (int i = 0; i < 3; ++i)
        *heads[i] = {.data = memory + i * token,
                     .stride_image = 3 * image,
                     .stride_head = c.head_dim,
                     .stride_token = 3 * token};
      args.grad = {
          .data = add(c.images * image), .stride_image = image, .stride_head = c.head_dim, .stride_token = token};
    } else {
      int64_t skip = c.layout == Layout::unaligned, row = c.head_dim + skip;
      for (Heads* heads : {&args.q, &args.k, &args.v, &args.grad})
        *heads = {.data = add(c.images * c.heads * c.tokens * row) + skip,
                  .stride_image = c.heads * c.tokens * row,
                  .stride_head = c.tokens * row,
                  .stride_token = row};
    }
    fill(args.q, 2);
    fill(args.k, 1);
    fill(args.v, 1);
    fill(args.grad, c.gradient);

    int64_t stride = c.layout == Layout::unaligned ? 2 : 1;
    int64_t count = c.images * c.tokens * stride - (stride - 1);
    mask = exact<W>(count, static_cast<W>(NAN));
    for (int64_t i = 0; i < count; i += stride)
      mask[i] = c.mask == Mask::zeros ? 0 : c.mask == Mask::ones ? 1 : std::max(0.0, uniform(-0.5, 1));
    args.mask = {.data = mask.get(), .stride_image = c.tokens * stride, .stride_token = stride};
    if (!c.sizes) return;
    size = exact<W>(c.images * c.tokens, W(0));
    for (int64_t i = 0; i < c.images * c.tokens; ++i) size[i] = static_cast<W>(uniform(0.5, 6));
    size[c.tokens - 1] = -1;  // is taken for the smallest positive number
    args.size = {.data = size.get(), .stride_image = c.tokens, .stride_token = 1};
  }

  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random); }

  T* add(int64_t count) {
    features.push_back(exact<T>(count, from_wide<T>(NAN)));
    return features.back().get();
  }

  T& at(const Heads& heads, int64_t b, int64_t h, int64_t i, int64_t c) {
    return const_cast<T*>(
        static_cast<const T*>(heads.data))[b * heads.stride_image + h * heads.stride_head + i * heads.stride_token + c];
  }
  double number(const Heads& heads, int64_t b, int64_t h, int64_t i, int64_t c) {
    return double(to_wide(at(heads, b, h, i, c)));
  }

  void fill(const Heads& heads, double magnitude) {
    for (int64_t b = 0; b < args.images; ++b)
      for (int64_t h = 0; h < args.heads; ++h)
        for (int64_t i = 0; i < args.tokens; ++i)
          for (int64_t c = 0; c < args.head_dim; ++c)
            at(heads, b, h, i, c) = from_wide<T>(static_cast<W>(magnitude * uniform(-1, 1)));
  }
};

// The largest logit of a query, and how far rounding may take its logits from these, in units of one rounding.
struct QueryLogits {
  double top = -INFINITY, uncertainty = 1;
};

// Fills `logits` with those of query i of image b, head h.
template <class T>
QueryLogits logits_of_query(Inputs<T>& in, int64_t b, int64_t h, int64_t i, std::vector<double>& logits) {
  const auto& a = in.args;
  QueryLogits result;
  for (int64_t j = 0; j < a.tokens; ++j) {
    double dot = 0, terms = 0;
    for (int64_t c = 0; c < a.head_dim; ++c) {
      double term = a.scale * in.number(a.q, b, h, i, c) * in.number(a.k, b, h, j, c);
      dot += term;
      terms += std::abs(term);
    }
    if (in.size) {
      double bias = std::log(std::max(double(in.size[b * a.tokens + j]), kTinySize));
      dot += bias;
      terms += std::abs(bias);
    }
    logits[j] = dot;
    result.top = std::max(result.top, dot);
    result.uncertainty = std::max(result.uncertainty, terms);
  }
  return result;
}

}  // namespace diffrate::cuda
