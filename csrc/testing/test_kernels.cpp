// Tests of the torch-free CPU kernels, mostly for the sanitizers: every buffer is exactly as long as it must be, so
// that one read or write too far is an error. Values are compared with plain loops in double. CTest runs this once for
// each instruction set (DIFFRATE_CPU_CAPABILITY), and once with the emulated CUDA kernels in their place
// (emulated_kernels.cpp). Python tests the operators in depth.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#define DIFFRATE_SIMD plain
#include "cpu/simd.h"

namespace {

using namespace diffrate;
namespace simd = diffrate::cpu::plain;

int passed = 0, failed = 0;

void check(bool good, const char* what, int64_t tokens = 0, int64_t channels = 0) {
  ++(good ? passed : failed);
  if (!good) std::printf("FAILED: %s (N = %ld, C = %ld)\n", what, long(tokens), long(channels));
}

bool near(double value, double expected, double tolerance = 2e-5) {
  return std::abs(value - expected) <= tolerance * (1 + std::abs(expected));
}

template <class T>
std::unique_ptr<T[]> exact(size_t count) {
  return std::unique_ptr<T[]>(new T[count]);  // not a vector: no spare capacity for a sanitizer to overlook
}

void run_on_threads(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i) threads.emplace_back(body, context, i, i + 1);
  for (auto& thread : threads) thread.join();
}

const cpu::Threads kPools[] = {{1, run_on_threads}, {3, run_on_threads}, {16, run_on_threads}};

struct Case {
  int64_t images, tokens, channels, prefix, k_p, k_m;
};

const Case kCases[] = {{2, 17, 24, 1, 12, 8}, {1, 65, 37, 0, 65, 33}, {3, 5, 1, 2, 4, 3},        {2, 1, 3, 1, 1, 1},
                       {2, 9, 16, 1, 1, 1},   {4, 40, 65, 1, 39, 2},  {1, 197, 96, 1, 168, 156}, {0, 8, 8, 1, 4, 3}};

// More tokens than the CUDA kernels keep in shared memory.
const Case kManyTokens = {2, 4200, 3, 1, 4190, 4150};

std::unique_ptr<float[]> random_floats(int64_t count, unsigned seed, float low = -1, float high = 1) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(low, high);
  auto values = exact<float>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = uniform(generator);
  return values;
}

Importance given(const float* importance, const Case& c) {
  int64_t patches = c.tokens - c.prefix;
  return {importance, Type::f32, 1, 1, patches, 0, 0, 1};
}

void test_sort_tokens(const Case& c, const cpu::Threads& threads) {
  auto x = random_floats(c.images * c.tokens * c.channels, 1);
  auto importance = random_floats(c.images * (c.tokens - c.prefix), 2);
  auto out = exact<float>(c.images * c.tokens * c.channels);
  auto size = exact<float>(c.images * c.tokens);
  auto order = exact<int64_t>(c.images * c.tokens);
  SortArgs args{Type::f32,
                c.images,
                c.tokens,
                c.channels,
                c.prefix,
                {x.get(), c.tokens * c.channels, c.channels},
                given(importance.get(), c),
                {nullptr, 0, 0},
                out.get(),
                size.get(),
                order.get()};
  cpu::kernels().sort_tokens(args, threads);
  bool sorted = true, moved = true;
  for (int64_t b = 0; b < c.images; ++b) {
    const float* scores = importance.get() + b * (c.tokens - c.prefix) - c.prefix;
    for (int64_t j = 0; j < c.tokens; ++j) {
      int64_t from = order[b * c.tokens + j];
      if (j < c.prefix) sorted = sorted && from == j;
      if (j > c.prefix) sorted = sorted && scores[order[b * c.tokens + j - 1]] >= scores[from];
      moved = moved && !std::memcmp(&out[(b * c.tokens + j) * c.channels], &x[(b * c.tokens + from) * c.channels],
                                    c.channels * sizeof(float));
    }
  }
  check(sorted, "sort_tokens: order", c.tokens, c.channels);
  check(moved, "sort_tokens: features", c.tokens, c.channels);
}

// Whether kept tokens are where the sort order has them, and every source is with its most similar destination.
bool sources_are_matched(const Case& c, int64_t image, const float* x, const float* residual, const float* importance,
                         const int64_t* slot) {
  const float* scores = importance + image * (c.tokens - c.prefix) - c.prefix;
  std::vector<int64_t> order(c.tokens);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin() + c.prefix, order.end(), [&](int64_t i, int64_t j) { return scores[i] > scores[j]; });
  auto value = [&](int64_t token, int64_t k) {
    int64_t at = (image * c.tokens + token) * c.channels + k;
    return residual ? x[at] + residual[at] : x[at];
  };
  auto dot = [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t k = 0; k < c.channels; ++k) sum += double(value(i, k)) * value(j, k);
    return sum;
  };
  bool good = true;
  std::vector<double> norms(c.k_m);
  for (int64_t j = 0; j < c.k_m; ++j) {
    norms[j] = std::sqrt(dot(order[j], order[j]));
    good = good && slot[order[j]] == j;
  }
  for (int64_t i = c.k_m; i < c.k_p; ++i) {
    auto similarity = [&](int64_t to) { return dot(order[i], order[to]) / norms[to]; };
    int64_t found = slot[order[i]];
    if (found < c.prefix || found >= c.k_m) return false;
    double best = -INFINITY;
    for (int64_t to = c.prefix; to < c.k_m; ++to) best = std::fmax(best, similarity(to));
    good = good && similarity(found) >= best - 1e-5 * std::abs(best);
  }
  return good;
}

// The mean of the tokens that share a slot, and every source in the slot of its most similar destination.
void test_prune_merge(const Case& c, const cpu::Threads& threads, bool with_residual) {
  auto x = random_floats(c.images * c.tokens * c.channels, 3);
  auto residual = random_floats(c.images * c.tokens * c.channels, 4);
  auto importance = random_floats(c.images * (c.tokens - c.prefix), 5);
  auto size = random_floats(c.images * c.tokens, 6, 0.5f, 3);
  auto out = exact<float>(c.images * c.k_m * c.channels);
  auto out_size = exact<float>(c.images * c.k_m);
  auto slot = exact<int64_t>(c.images * c.tokens);
  PruneMergeArgs args{Type::f32,
                      c.images,
                      c.tokens,
                      c.channels,
                      c.prefix,
                      c.k_p,
                      c.k_m,
                      {x.get(), c.tokens * c.channels, c.channels},
                      {with_residual ? residual.get() : nullptr, c.tokens * c.channels, c.channels},
                      given(importance.get(), c),
                      {size.get(), c.tokens, 1},
                      false,
                      false,
                      out.get(),
                      out_size.get(),
                      slot.get()};
  cpu::kernels().prune_merge(args, threads);
  bool counts = true, means = true, sizes = true, matches = true;
  for (int64_t b = 0; b < c.images; ++b) {
    matches = matches && sources_are_matched(c, b, x.get(), with_residual ? residual.get() : nullptr, importance.get(),
                                             slot.get() + b * c.tokens);
    int64_t pruned = 0;
    std::vector<double> sum(c.k_m * c.channels), members(c.k_m), total(c.k_m);
    for (int64_t i = 0; i < c.tokens; ++i) {
      int64_t to = slot[b * c.tokens + i];
      counts = counts && to >= -1 && to < c.k_m;
      if (to < 0 || to >= c.k_m) {
        ++pruned;
        continue;
      }
      ++members[to];
      total[to] += size[b * c.tokens + i];
      for (int64_t k = 0; k < c.channels; ++k) {
        int64_t at = (b * c.tokens + i) * c.channels + k;
        sum[to * c.channels + k] += with_residual ? x[at] + residual[at] : x[at];
      }
    }
    counts = counts && pruned == c.tokens - c.k_p;
    for (int64_t j = 0; j < c.k_m; ++j) {
      counts = counts && members[j] >= 1 && (j >= c.prefix || members[j] == 1);
      sizes = sizes && near(out_size[b * c.k_m + j], total[j]);
      for (int64_t k = 0; k < c.channels; ++k)
        means = means && near(out[(b * c.k_m + j) * c.channels + k], sum[j * c.channels + k] / members[j]);
    }
  }
  check(counts, "prune_merge: slots", c.tokens, c.channels);
  check(matches, "prune_merge: matches", c.tokens, c.channels);
  check(means, "prune_merge: features", c.tokens, c.channels);
  check(sizes, "prune_merge: sizes", c.tokens, c.channels);
}

void test_merge_reduce(const Case& c, const cpu::Threads& threads) {
  auto x = random_floats(c.images * c.tokens * c.channels, 7);
  auto dst = exact<int64_t>(c.images * c.tokens);
  for (int64_t i = 0; i < c.images * c.tokens; ++i)
    dst[i] = i % 7 == 3 ? 1000 + c.k_m : (i * 5) % (c.k_m + 1) - 1;  // out of range: goes nowhere
  auto out = exact<float>(c.images * c.k_m * c.channels);
  MergeReduceArgs args{
      Type::f32, c.images, c.tokens, c.k_m,           c.channels, {x.get(), c.tokens * c.channels, c.channels},
      dst.get(), c.tokens, 1,        {nullptr, 0, 0}, out.get()};
  cpu::kernels().merge_reduce(args, threads);
  auto back = exact<float>(c.images * c.tokens * c.channels);
  MergeReduceArgs backward = args;
  backward.x = {out.get(), c.k_m * c.channels, c.channels};
  backward.out = back.get();
  cpu::kernels().merge_reduce_backward(backward, threads);
  // <mean(x), out> = <x, gradient of the mean at out>
  double left = 0, right = 0;
  for (int64_t i = 0; i < c.images * c.k_m * c.channels; ++i) left += double(out[i]) * out[i];
  for (int64_t i = 0; i < c.images * c.tokens * c.channels; ++i) right += double(x[i]) * back[i];
  check(near(left, right), "merge_reduce: the backward is the forward's transpose", c.tokens, c.channels);
}

void test_attention(const Case& c, const cpu::Threads& threads) {
  const int64_t heads = 3;
  int64_t patches = c.tokens - c.prefix;
  auto q = random_floats(c.images * heads * c.tokens * c.channels, 8);
  auto k = random_floats(c.images * heads * c.tokens * c.channels, 9);
  auto size = random_floats(c.images * c.tokens, 10, 0.5f, 3);
  auto first = exact<float>(c.images * patches), received = exact<float>(c.images * patches);
  AttentionArgs args{Type::f32,
                     c.images,
                     heads,
                     c.tokens,
                     c.channels,
                     c.prefix,
                     q.get(),
                     heads * c.tokens * c.channels,
                     c.tokens * c.channels,
                     c.channels,
                     k.get(),
                     heads * c.tokens * c.channels,
                     c.tokens * c.channels,
                     c.channels,
                     {size.get(), c.tokens, 1},
                     0.5,
                     first.get()};
  cpu::kernels().class_attention(args, threads);
  args.importance = received.get();
  cpu::kernels().received_attention(args, threads);
  bool class_right = true, received_right = true;
  for (int64_t b = 0; b < c.images; ++b) {
    std::vector<double> row(c.tokens), class_mean(c.tokens), received_mean(c.tokens);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < c.tokens; ++i) {
        double total = 0;
        for (int64_t j = 0; j < c.tokens; ++j) {
          double dot = 0;
          for (int64_t d = 0; d < c.channels; ++d)
            dot += double(q[((b * heads + h) * c.tokens + i) * c.channels + d]) *
                   k[((b * heads + h) * c.tokens + j) * c.channels + d];
          total += row[j] = std::exp(0.5 * dot) * size[b * c.tokens + j];
        }
        for (int64_t j = 0; j < c.tokens; ++j) {
          if (i == 0) class_mean[j] += row[j] / total / heads;
          received_mean[j] += row[j] / total / heads / c.tokens;
        }
      }
    }
    for (int64_t j = 0; j < patches; ++j) {
      class_right = class_right && near(first[b * patches + j], class_mean[j + c.prefix]);
      received_right = received_right && near(received[b * patches + j], received_mean[j + c.prefix]);
    }
  }
  check(class_right, "class_attention", c.tokens, c.channels);
  check(received_right, "received_attention", c.tokens, c.channels);
}

// sum_i out_i . grad_i of masked attention, by its formula in double.
double masked_attention_loss(const Case& c, int64_t heads, const std::vector<double>& q, const std::vector<double>& k,
                             const std::vector<double>& v, const std::vector<double>& mask, const float* size,
                             const float* grad, std::vector<double>* out, std::vector<double>* importance) {
  double loss = 0;
  std::vector<double> e(c.tokens);
  for (int64_t b = 0; b < c.images; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < c.tokens; ++i) {
        auto row = [&](int64_t token) { return ((b * heads + h) * c.tokens + token) * c.channels; };
        double top = -INFINITY, total = 1e-6;
        for (int64_t j = 0; j < c.tokens; ++j) {
          e[j] = std::log(double(size[b * c.tokens + j]));
          for (int64_t d = 0; d < c.channels; ++d) e[j] += 0.5 * q[row(i) + d] * k[row(j) + d];
          top = std::fmax(top, e[j]);
        }
        for (int64_t j = 0; j < c.tokens; ++j) {
          e[j] = std::exp(e[j] - top) * (i == j ? 1 : mask[b * c.tokens + j]);
          total += e[j];
        }
        for (int64_t j = 0; j < c.tokens; ++j) {
          double a = (e[j] + 1e-6 / double(c.tokens)) / total;
          if (importance && i == 0 && j >= c.prefix)
            (*importance)[b * (c.tokens - c.prefix) + j - c.prefix] += a / double(heads);
          for (int64_t d = 0; d < c.channels; ++d) {
            loss += a * v[row(j) + d] * double(grad[row(i) + d]);
            if (out) (*out)[((b * c.tokens + i) * heads + h) * c.channels + d] += a * v[row(j) + d];
          }
        }
      }
    }
  }
  return loss;
}

// The forward pass against the formula, the gradients against its difference quotient in a random direction.
void test_masked_attention(const Case& c, const cpu::Threads& threads) {
  const int64_t heads = 2;
  int64_t rows = c.images * c.tokens, count = rows * heads * c.channels, patches = c.tokens - c.prefix;
  auto q = random_floats(count, 11), k = random_floats(count, 12), v = random_floats(count, 13);
  auto size = random_floats(rows, 14, 0.5f, 3), grad = random_floats(count, 15), mask = exact<float>(rows);
  for (int64_t i = 0; i < rows; ++i) mask[i] = i % c.tokens < c.k_p;
  auto out = exact<float>(count), importance = exact<float>(c.images * patches);
  auto grad_q = exact<float>(count), grad_k = exact<float>(count), grad_v = exact<float>(count);
  auto grad_mask = exact<float>(rows);
  auto heads_of = [&](const float* data) {
    return Heads{data, heads * c.tokens * c.channels, c.tokens * c.channels, c.channels};
  };
  MaskedAttentionArgs args{Type::f32,
                           c.images,
                           heads,
                           c.tokens,
                           c.channels,
                           c.prefix,
                           heads_of(q.get()),
                           heads_of(k.get()),
                           heads_of(v.get()),
                           {mask.get(), c.tokens, 1},
                           {size.get(), c.tokens, 1},
                           0.5,
                           false,
                           out.get(),
                           importance.get(),
                           heads_of(grad.get()),
                           grad_q.get(),
                           grad_k.get(),
                           grad_v.get(),
                           grad_mask.get()};
  cpu::kernels().masked_attention(args, threads);
  cpu::kernels().masked_attention_backward(args, threads);

  auto widened = [](const float* values, int64_t n) { return std::vector<double>(values, values + n); };
  std::vector<double> expected(count), expected_importance(c.images * patches);
  masked_attention_loss(c, heads, widened(q.get(), count), widened(k.get(), count), widened(v.get(), count),
                        widened(mask.get(), rows), size.get(), grad.get(), &expected, &expected_importance);
  bool forward_right = true, importance_right = true;
  for (int64_t i = 0; i < count; ++i) forward_right = forward_right && near(out[i], expected[i]);
  for (int64_t i = 0; i < c.images * patches; ++i)
    importance_right = importance_right && near(importance[i], expected_importance[i]);
  check(forward_right, "masked_attention", c.tokens, c.channels);
  check(importance_right, "masked_attention: importance", c.tokens, c.channels);

  auto step = random_floats(count, 16), mask_step = random_floats(rows, 17);
  const double h = 1e-4;
  auto moved = [&](const float* values, const float* direction, int64_t n, double by) {
    std::vector<double> result(n);
    for (int64_t i = 0; i < n; ++i) result[i] = values[i] + by * direction[i];
    return result;
  };
  auto along = [&](const float* gradient, const float* direction, int64_t layout) {
    double total = 0;
    for (int64_t i = 0; i < layout; ++i) {
      int64_t at = i;
      if (layout == count) {  // gradients are (B, N, H, D), directions (B, H, N, D)
        int64_t d = i % c.channels, head = i / c.channels % heads, token = i / c.channels / heads % c.tokens;
        int64_t image = i / c.channels / heads / c.tokens;
        at = ((image * heads + head) * c.tokens + token) * c.channels + d;
      }
      total += double(gradient[i]) * direction[at];
    }
    return total;
  };
  auto loss_at = [&](int which, double by) {
    auto maybe = [&](int index, const float* values) {
      return moved(values, step.get(), count, index == which ? by : 0);
    };
    return masked_attention_loss(c, heads, maybe(0, q.get()), maybe(1, k.get()), maybe(2, v.get()),
                                 moved(mask.get(), mask_step.get(), rows, which == 3 ? by : 0), size.get(), grad.get(),
                                 nullptr, nullptr);
  };
  const float* gradients[] = {grad_q.get(), grad_k.get(), grad_v.get(), grad_mask.get()};
  const char* names[] = {"masked_attention: gradient of q", "masked_attention: gradient of k",
                         "masked_attention: gradient of v", "masked_attention: gradient of the mask"};
  for (int which = 0; which < 4; ++which) {
    double quotient = (loss_at(which, h) - loss_at(which, -h)) / (2 * h);
    double found = which < 3 ? along(gradients[which], step.get(), count) : along(gradients[3], mask_step.get(), rows);
    check(near(found, quotient, 1e-3), names[which], c.tokens, c.channels);
  }
}

void test_compression_rate(int64_t patches, int64_t granularity, const cpu::Threads& threads) {
  const int64_t proxies = 3, prefix = 1, tokens = patches + prefix;
  int64_t candidates = (patches - 1) / granularity + 1;
  auto logits = random_floats(proxies * candidates, 18);
  auto kept = exact<float>(proxies), keep = exact<float>(proxies * tokens);
  auto grad_kept = random_floats(proxies, 19), grad_keep = random_floats(proxies * tokens, 20);
  auto grad = exact<float>(proxies * candidates);
  CompressionRateArgs args{Type::f32,    proxies,    candidates, patches,         granularity,     prefix,
                           logits.get(), kept.get(), keep.get(), grad_kept.get(), grad_keep.get(), grad.get()};
  cpu::kernels().compression_rate(args, threads);
  cpu::kernels().compression_rate_backward(args, threads);
  bool kept_right = true, keep_right = true, grad_right = true;
  for (int64_t l = 0; l < proxies; ++l) {
    double total = 0, mean = 0, mean_grad = 0;
    std::vector<double> p(candidates), t(tokens), to_p(candidates);
    for (int64_t k = 0; k < candidates; ++k) total += p[k] = std::exp(double(logits[l * candidates + k]));
    for (int64_t k = 0; k < candidates; ++k) {
      int64_t c = patches - granularity * k;
      p[k] /= total;
      mean += p[k] * double(c);
      to_p[k] = double(grad_kept[l]) * double(c);
      for (int64_t j = 0; j < c + prefix; ++j) {
        t[j] += p[k];
        to_p[k] += double(grad_keep[l * tokens + j]);
      }
      mean_grad += p[k] * to_p[k];
    }
    kept_right = kept_right && kept[l] == std::ceil(mean) + prefix;
    for (int64_t j = 0; j < tokens; ++j) keep_right = keep_right && near(keep[l * tokens + j], t[j]);
    for (int64_t k = 0; k < candidates; ++k)
      grad_right = grad_right && near(grad[l * candidates + k], p[k] * (to_p[k] - mean_grad));
  }
  check(kept_right, "compression_rate: kept", tokens, granularity);
  check(keep_right, "compression_rate: keep probability", tokens, granularity);
  check(grad_right, "compression_rate: gradient", tokens, granularity);
}

void test_masked_prune_merge(const Case& c, const cpu::Threads& threads) {
  int64_t rows = c.images * c.tokens, last = c.tokens - c.tokens / 8;
  auto x = random_floats(rows * c.channels, 21), size = random_floats(rows, 22, 0.5f, 3), mask = exact<float>(rows);
  // what is masked already is what matters least
  auto importance = exact<float>(c.images * (c.tokens - c.prefix));
  for (int64_t i = 0; i < c.images * (c.tokens - c.prefix); ++i)
    importance[i] = float(c.tokens - i % (c.tokens - c.prefix));
  for (int64_t i = 0; i < rows; ++i) mask[i] = i % c.tokens < last;
  auto out = exact<float>(rows * c.channels), out_mask = exact<float>(rows), out_size = exact<float>(rows);
  auto order = exact<int64_t>(rows), dst = exact<int64_t>(rows);
  MaskedPruneMergeArgs args{Type::f32,
                            c.images,
                            c.tokens,
                            c.channels,
                            c.prefix,
                            last,
                            c.k_p,
                            c.k_m,
                            nullptr,
                            nullptr,
                            {x.get(), c.tokens * c.channels, c.channels},
                            given(importance.get(), c),
                            {mask.get(), c.tokens, 1},
                            {size.get(), c.tokens, 1},
                            false,
                            out.get(),
                            out_mask.get(),
                            out_size.get(),
                            order.get(),
                            dst.get()};
  cpu::kernels().masked_prune_merge(args, threads);
  int64_t middle = std::min(last, c.k_p), kept = std::min(middle, c.k_m);
  bool places = true, masks = true, means = true, sizes = true;
  for (int64_t b = 0; b < c.images; ++b) {
    std::vector<double> sum(c.tokens * c.channels), members(c.tokens), total(c.tokens);
    auto started = [&](int64_t j) {
      double own = size[b * c.tokens + order[b * c.tokens + j]];
      return kept < middle && j < middle ? std::fmax(own, 1) : own;
    };
    for (int64_t j = 0; j < c.tokens; ++j) {
      int64_t at = b * c.tokens + j, to = dst[at];
      places = places && order[at] == j && (j >= kept && j < middle ? to >= c.prefix && to < kept : to == j);
      masks = masks && out_mask[at] == (j < kept);
      if (to < 0 || to >= c.tokens) continue;
      ++members[to];
      total[to] += started(j);
      for (int64_t k = 0; k < c.channels; ++k) sum[to * c.channels + k] += x[at * c.channels + k];
    }
    for (int64_t j = 0; j < c.tokens; ++j) {
      int64_t at = b * c.tokens + j;
      bool is_source = j >= kept && j < middle;
      sizes = sizes && near(out_size[at], is_source ? started(j) : total[j]);
      for (int64_t k = 0; k < c.channels; ++k)
        means = means && near(out[at * c.channels + k],
                              is_source ? x[at * c.channels + k] : sum[j * c.channels + k] / members[j]);
    }
  }
  check(places, "masked_prune_merge: order and destinations", c.tokens, c.channels);
  check(masks, "masked_prune_merge: mask", c.tokens, c.channels);
  check(means, "masked_prune_merge: features", c.tokens, c.channels);
  check(sizes, "masked_prune_merge: sizes", c.tokens, c.channels);
}

// float16 and bfloat16 as every value's round trip and as rounding to nearest even.
template <class T>
void test_half_format(T, const char* name) {
  bool round_trip = true, nearest = true;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    T value{static_cast<uint16_t>(bits)};
    float wide = simd::to_wide(value);
    T back;
    simd::store_some(&back, wide - simd::Vec<float>{}, 1);  // adding to zero would lose the sign of -0
    round_trip = round_trip && (wide != wide ? simd::to_wide(back) != simd::to_wide(back) : back.bits == value.bits);
    T next{static_cast<uint16_t>(bits + 1)};
    float above = simd::to_wide(next);
    if (!std::isfinite(wide) || !std::isfinite(above) || ((bits + 1) & 0x7fff) == 0) continue;
    T middle;
    simd::store_some(&middle, simd::Vec<float>{} + (wide + (above - wide) / 2), 1);
    nearest = nearest && middle.bits == ((bits & 1) ? next.bits : value.bits);
  }
  check(round_trip, name);
  check(nearest, name);
}

void test_exp() {
  double worst = 0;
  for (float x = 0; x > -87; x -= 0.01f) {
    double expected = std::exp(double(x));
    worst = std::fmax(worst, std::abs(simd::exp_nonpositive(simd::Vec<float>{} + x)[0] - expected) / expected);
  }
  check(worst < 3e-7, "exp_nonpositive");
  check(simd::exp_nonpositive(simd::Vec<float>{} - INFINITY)[0] < 1.2e-38f, "exp_nonpositive of -inf");
}

}  // namespace

int main() {
  const char* wanted = std::getenv("DIFFRATE_CPU_CAPABILITY");
  if (wanted && std::strcmp(wanted, cpu::kernels().name)) std::printf("this processor lacks %s\n", wanted);
  for (const auto& threads : kPools) {
    for (const Case& c : kCases) {
      test_sort_tokens(c, threads);
      test_prune_merge(c, threads, false);
      test_prune_merge(c, threads, true);
      test_merge_reduce(c, threads);
      test_attention(c, threads);
      test_masked_attention(c, threads);
      test_masked_prune_merge(c, threads);
    }
    test_sort_tokens(kManyTokens, threads);
    test_prune_merge(kManyTokens, threads, true);
    test_masked_prune_merge(kManyTokens, threads);
    test_compression_rate(196, 1, threads);
    test_compression_rate(17, 4, threads);
    test_compression_rate(1, 1, threads);
  }
  test_half_format(simd::Half{}, "float16: round trip, rounding to nearest even");
  test_half_format(simd::BFloat16{}, "bfloat16: round trip, rounding to nearest even");
  test_exp();
  std::printf("%s: %d passed, %d failed\n", cpu::kernels().name, passed, failed);
  return failed != 0;
}
