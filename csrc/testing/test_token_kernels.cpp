// Tests of the kernels of sort_tokens, prune_merge, merge_reduce, masked_prune_merge and compression_rate.
#include <algorithm>
#include <numeric>

#include "testing/kernel_cases.h"

namespace diffrate::testing {
namespace {

void test_sort_tokens(const Case& c, const cpu::Threads& threads) {
  auto x = random_floats(c.images * c.tokens * c.channels, 1);
  auto importance = random_floats(c.images * (c.tokens - c.prefix), 2);
  auto out = exact<float>(c.images * c.tokens * c.channels);
  auto size = exact<float>(c.images * c.tokens);
  auto order = exact<int64_t>(c.images * c.tokens);
  SortArgs args{.type = Type::f32,
                .images = c.images,
                .tokens = c.tokens,
                .channels = c.channels,
                .prefix = c.prefix,
                .x = tokens_of(x.get(), c),
                .importance = given(importance.get(), c),
                .size = {},
                .out = out.get(),
                .out_size = size.get(),
                .order = order.get()};
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

void test_add_norm(const Case& c, const cpu::Threads& threads) {
  int64_t rows = c.images * c.tokens, count = rows * c.channels;
  auto x = random_floats(count, 1), residual = random_floats(count, 2), weight = random_floats(c.channels, 3);
  auto sum = exact<float>(count), normalized = exact<float>(count);
  cpu::kernels().add_norm({.type = Type::f32,
                           .rows = rows,
                           .channels = c.channels,
                           .x = x.get(),
                           .residual = residual.get(),
                           .out = sum.get(),
                           .norm = {.weight = weight.get(), .bias = nullptr, .eps = 0.25, .out = normalized.get()}},
                          threads);
  bool added = true, right = true;
  for (int64_t at = 0; at < count; at += c.channels) {
    double mean = 0, variance = 0;
    for (int64_t i = at; i < at + c.channels; ++i) {
      added = added && sum[i] == x[i] + residual[i];
      mean += sum[i] / double(c.channels);
    }
    for (int64_t i = at; i < at + c.channels; ++i) variance += (sum[i] - mean) * (sum[i] - mean) / double(c.channels);
    for (int64_t i = 0; i < c.channels; ++i)
      right = right && near(normalized[at + i], (sum[at + i] - mean) / std::sqrt(variance + 0.25) * weight[i]);
  }
  check(added, "add_norm: sum", c.tokens, c.channels);
  check(right, "add_norm: normalized", c.tokens, c.channels);
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

// Whether rows (rows, C) are normalised.
bool rows_are_normalized(const LayerNorm& norm, const float* rows, int64_t count, int64_t channels) {
  auto at = [](const void* data, int64_t i) { return double(static_cast<const float*>(data)[i]); };
  bool good = true;
  for (int64_t row = 0; row < count; ++row) {
    double mean = 0, variance = 0;
    for (int64_t k = 0; k < channels; ++k) mean += at(rows, row * channels + k) / double(channels);
    for (int64_t k = 0; k < channels; ++k) variance += std::pow(at(rows, row * channels + k) - mean, 2);
    double scale = 1 / std::sqrt(variance / double(channels) + norm.eps);
    for (int64_t k = 0; k < channels; ++k)
      good = good && near(at(norm.out, row * channels + k),
                          (at(rows, row * channels + k) - mean) * scale * at(norm.weight, k) + at(norm.bias, k));
  }
  return good;
}

// The mean of the tokens that share a slot, and every source in the slot of its most similar destination.
void test_prune_merge(const Case& c, const cpu::Threads& threads, bool with_residual, bool with_norm) {
  auto x = random_floats(c.images * c.tokens * c.channels, 3);
  auto residual = random_floats(c.images * c.tokens * c.channels, 4);
  auto importance = random_floats(c.images * (c.tokens - c.prefix), 5);
  auto size = random_floats(c.images * c.tokens, 6, 0.5f, 3);
  auto out = exact<float>(c.images * c.k_m * c.channels);
  auto out_size = exact<float>(c.images * c.k_m);
  auto slot = exact<int64_t>(c.images * c.tokens);
  auto weight = random_floats(c.channels, 7), bias = random_floats(c.channels, 8);
  auto normalized = exact<float>(c.images * c.k_m * c.channels);
  LayerNorm norm{.weight = weight.get(), .bias = bias.get(), .eps = 1e-5, .out = normalized.get()};
  PruneMergeArgs args{.type = Type::f32,
                      .images = c.images,
                      .tokens = c.tokens,
                      .channels = c.channels,
                      .prefix = c.prefix,
                      .k_p = c.k_p,
                      .k_m = c.k_m,
                      .x = tokens_of(x.get(), c),
                      .residual = tokens_of(with_residual ? residual.get() : nullptr, c),
                      .importance = given(importance.get(), c),
                      .size = vector_of(size.get(), c),
                      .weighted_mean = false,
                      .cosine_sizes = false,
                      .out = out.get(),
                      .out_size = out_size.get(),
                      .slot = slot.get(),
                      .norm = with_norm ? norm : LayerNorm{}};
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
  if (with_norm)
    check(rows_are_normalized(norm, out.get(), c.images * c.k_m, c.channels), "prune_merge: norm", c.tokens,
          c.channels);
}

void test_merge_reduce(const Case& c, const cpu::Threads& threads, bool weighted) {
  auto x = random_floats(c.images * c.tokens * c.channels, 7);
  auto residual = random_floats(c.images * c.tokens * c.channels, 27);  // beside weights
  auto weights = random_floats(c.images * c.tokens, 25, 0.5f, 3);
  auto dst = exact<int64_t>(c.images * c.tokens);
  for (int64_t i = 0; i < c.images * c.tokens; ++i)
    dst[i] = i % 7 == 3 ? 1000000 + c.k_m : (i * 5) % (c.k_m + 1) - 1;  // out of range: goes nowhere
  auto out = exact<float>(c.images * c.k_m * c.channels);
  MergeReduceArgs args{.type = Type::f32,
                       .images = c.images,
                       .tokens = c.tokens,
                       .kept = c.k_m,
                       .channels = c.channels,
                       .x = tokens_of(x.get(), c),
                       .residual = tokens_of(weighted ? residual.get() : nullptr, c),
                       .dst = dst.get(),
                       .dst_stride_image = c.tokens,
                       .dst_stride_token = 1,
                       .weights = vector_of(weighted ? weights.get() : nullptr, c),
                       .out = out.get()};
  cpu::kernels().merge_reduce(args, threads);
  auto grad = random_floats(c.images * c.k_m * c.channels, 26);
  auto back = exact<float>(c.images * c.tokens * c.channels);
  MergeReduceArgs backward = args;
  backward.x = {grad.get(), c.k_m * c.channels, c.channels};
  backward.residual = {};
  backward.out = back.get();
  cpu::kernels().merge_reduce_backward(backward, threads);
  bool means = true, gradients = true;
  for (int64_t b = 0; b < c.images; ++b) {
    std::vector<double> sum(c.k_m * c.channels), total(c.k_m);
    auto goes_to = [&](int64_t i) { return dst[b * c.tokens + i] < c.k_m ? dst[b * c.tokens + i] : -1; };
    auto weight = [&](int64_t i) { return weighted ? double(weights[b * c.tokens + i]) : 1; };
    for (int64_t i = 0; i < c.tokens; ++i) {
      if (goes_to(i) < 0) continue;
      total[goes_to(i)] += weight(i);
      for (int64_t k = 0; k < c.channels; ++k) {
        const int64_t at = (b * c.tokens + i) * c.channels + k;
        sum[goes_to(i) * c.channels + k] += weight(i) * (weighted ? x[at] + residual[at] : x[at]);
      }
    }
    for (int64_t j = 0; j < c.k_m * c.channels; ++j) {
      const double mean = total[j / c.channels] != 0 ? sum[j] / total[j / c.channels] : 0;
      means = means && near(out[b * c.k_m * c.channels + j], mean);
    }
    for (int64_t i = 0; i < c.tokens; ++i)
      for (int64_t k = 0; k < c.channels; ++k) {
        const int64_t to = goes_to(i);
        const double share = to < 0 ? 0 : weight(i) / total[to] * grad[(b * c.k_m + to) * c.channels + k];
        gradients = gradients && near(back[(b * c.tokens + i) * c.channels + k], share);
      }
  }
  check(means, "merge_reduce: means", c.tokens, c.channels);
  check(gradients, "merge_reduce: gradient", c.tokens, c.channels);
}

void test_compression_rate(int64_t patches, int64_t granularity, const cpu::Threads& threads) {
  const int64_t proxies = 3, prefix = 1, tokens = patches + prefix;
  int64_t candidates = (patches - 1) / granularity + 1;
  auto logits = random_floats(proxies * candidates, 18);
  auto kept = exact<float>(proxies), keep = exact<float>(proxies * tokens);
  auto grad_kept = random_floats(proxies, 19), grad_keep = random_floats(proxies * tokens, 20);
  auto grad = exact<float>(proxies * candidates);
  CompressionRateArgs args{.type = Type::f32,
                           .proxies = proxies,
                           .candidates = candidates,
                           .patches = patches,
                           .granularity = granularity,
                           .prefix = prefix,
                           .logits = logits.get(),
                           .kept = kept.get(),
                           .keep_prob = keep.get(),
                           .grad_kept = grad_kept.get(),
                           .grad_keep_prob = grad_keep.get(),
                           .grad_logits = grad.get()};
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
  // numbers that are rounded
  const float kept_p = static_cast<float>(c.k_p) + 0.25f, kept_m = static_cast<float>(c.k_m) - 0.5f;
  MaskedPruneMergeArgs args{.type = Type::f32,
                            .images = c.images,
                            .tokens = c.tokens,
                            .channels = c.channels,
                            .prefix = c.prefix,
                            .kept_p = &kept_p,
                            .kept_m = &kept_m,
                            .x = tokens_of(x.get(), c),
                            .importance = given(importance.get(), c),
                            .mask = vector_of(mask.get(), c),
                            .size = vector_of(size.get(), c),
                            .cosine_sizes = false,
                            .out = out.get(),
                            .out_mask = out_mask.get(),
                            .out_size = out_size.get(),
                            .order = order.get(),
                            .dst = dst.get()};
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

// Given an order and destinations, or nonsense in their place, which counts as each token's own position.
void test_masked_prune_merge_backward(const Case& c, const cpu::Threads& threads, bool nonsense) {
  int64_t rows = c.images * c.tokens, last = c.tokens - c.tokens / 8;
  int64_t middle = std::min(last, c.k_p), kept = std::min(middle, c.k_m);
  auto order = exact<int64_t>(rows), dst = exact<int64_t>(rows);
  std::mt19937 generator(25);
  for (int64_t b = 0; b < c.images; ++b) {
    int64_t* of_image = order.get() + b * c.tokens;
    std::iota(of_image, of_image + c.tokens, 0);
    if (!nonsense) std::shuffle(of_image, of_image + c.tokens, generator);
    for (int64_t j = 0; j < c.tokens; ++j)
      dst[b * c.tokens + j] = j >= kept && j < middle && !nonsense ? c.prefix + (j * 5 + b) % (kept - c.prefix) : j;
  }
  auto given_order = exact<int64_t>(rows), given_dst = exact<int64_t>(rows);
  for (int64_t i = 0; i < rows; ++i) {
    given_order[i] = nonsense ? -1 - i : order[i];
    given_dst[i] = nonsense ? c.tokens + i : dst[i];
  }
  auto mask = exact<float>(rows);
  for (int64_t i = 0; i < rows; ++i) mask[i] = i % c.tokens < last;
  auto grad_out = random_floats(rows * c.channels, 26), grad_out_mask = random_floats(rows, 27);
  const float kept_p = static_cast<float>(c.k_p) + 0.25f, kept_m = static_cast<float>(c.k_m) - 0.5f;
  struct Gradients {
    std::unique_ptr<float[]> x, mask, prune_prob, merge_prob;
  };
  auto compute = [&](bool with_x, bool with_mask) {
    Gradients found{exact<float>(rows * c.channels, NAN), exact<float>(rows, NAN), exact<float>(c.tokens, NAN),
                    exact<float>(c.tokens, NAN)};
    cpu::kernels().masked_prune_merge_backward(
        {.type = Type::f32,
         .images = c.images,
         .tokens = c.tokens,
         .channels = c.channels,
         .prefix = c.prefix,
         .kept_p = &kept_p,
         .kept_m = &kept_m,
         .mask = vector_of(mask.get(), c),
         .order = given_order.get(),
         .dst = given_dst.get(),
         .grad_out = tokens_of(with_x ? grad_out.get() : nullptr, c),
         .grad_out_mask = vector_of(with_mask ? grad_out_mask.get() : nullptr, c),
         .grad_x = with_x ? found.x.get() : nullptr,
         .grad_mask = with_mask ? found.mask.get() : nullptr,
         .grad_prune_prob = with_mask ? found.prune_prob.get() : nullptr,
         .grad_merge_prob = with_mask ? found.merge_prob.get() : nullptr},
        threads);
    return found;
  };
  Gradients found = compute(true, true);
  bool features = true, masks = true, probabilities = true;
  std::vector<double> to_prune(c.tokens), to_merge(c.tokens);
  for (int64_t b = 0; b < c.images; ++b) {
    std::vector<double> members(c.tokens);
    for (int64_t j = 0; j < c.tokens; ++j) ++members[dst[b * c.tokens + j]];
    for (int64_t j = 0; j < c.tokens; ++j) {
      int64_t at = b * c.tokens + j, from = b * c.tokens + order[at], to = b * c.tokens + dst[at];
      bool merged = j >= kept && j < middle, pruned = j >= middle && j < last;
      for (int64_t k = 0; k < c.channels; ++k) {
        double shared = grad_out[to * c.channels + k] / members[dst[at]];
        features = features && near(found.x[from * c.channels + k],
                                    to == at ? shared : shared + double(grad_out[at * c.channels + k]));
      }
      masks = masks && found.mask[from] == (merged || pruned ? 0 : grad_out_mask[at]);
      if (kept < middle && !pruned) to_merge[j] += double(grad_out_mask[at]) * mask[from];
      if (middle < last && !merged) to_prune[j] += double(grad_out_mask[at]) * mask[from];
    }
  }
  for (int64_t j = 0; j < c.tokens; ++j)
    probabilities = probabilities && near(found.prune_prob[j], to_prune[j]) && near(found.merge_prob[j], to_merge[j]);
  Gradients of_x = compute(true, false), of_mask = compute(false, true);
  auto same = [](const auto& a, const auto& b, int64_t count) {
    return std::memcmp(a.get(), b.get(), count * sizeof(float)) == 0;
  };
  check(features, "masked_prune_merge_backward: features", c.tokens, c.channels);
  check(masks, "masked_prune_merge_backward: mask", c.tokens, c.channels);
  check(probabilities, "masked_prune_merge_backward: probabilities", c.tokens, c.channels);
  check(same(found.x, of_x.x, rows * c.channels) && same(found.mask, of_mask.mask, rows) &&
            same(found.prune_prob, of_mask.prune_prob, c.tokens) &&
            same(found.merge_prob, of_mask.merge_prob, c.tokens),
        "masked_prune_merge_backward: either part alone", c.tokens, c.channels);
}

// How many of seven tokens, all alive before, stay alive. common/kept_numbers.h has the rule, test_numbers.cpp tests
// it.
void test_kept_number(float kept_p, float kept_m, int64_t expected, const cpu::Threads& threads) {
  const Case c{.images = 2, .tokens = 7, .channels = 3, .prefix = 0, .k_p = 0, .k_m = 0};
  int64_t rows = c.images * c.tokens;
  auto x = random_floats(rows * c.channels, 23), importance = random_floats(rows, 24), mask = exact<float>(rows, 1);
  auto out = exact<float>(rows * c.channels), out_mask = exact<float>(rows), out_size = exact<float>(rows);
  auto order = exact<int64_t>(rows), dst = exact<int64_t>(rows);
  cpu::kernels().masked_prune_merge({.type = Type::f32,
                                     .images = c.images,
                                     .tokens = c.tokens,
                                     .channels = c.channels,
                                     .prefix = c.prefix,
                                     .kept_p = &kept_p,
                                     .kept_m = &kept_m,
                                     .x = tokens_of(x.get(), c),
                                     .importance = given(importance.get(), c),
                                     .mask = vector_of(mask.get(), c),
                                     .size = {},
                                     .cosine_sizes = true,
                                     .out = out.get(),
                                     .out_mask = out_mask.get(),
                                     .out_size = out_size.get(),
                                     .order = order.get(),
                                     .dst = dst.get()},
                                    threads);
  bool good = true;
  for (int64_t i = 0; i < rows; ++i) good = good && out_mask[i] == (i % c.tokens < expected);
  check(good, "masked_prune_merge: kept_p = " + std::to_string(kept_p) + ", kept_m = " + std::to_string(kept_m));
}

}  // namespace
}  // namespace diffrate::testing

int main() {
  using namespace diffrate::testing;
  say_what_runs();
  for (const auto& threads : pools()) {
    for (const Case& c : kCases) {
      test_sort_tokens(c, threads);
      test_add_norm(c, threads);
      for (bool with_residual : {false, true})
        for (bool with_norm : {false, true}) test_prune_merge(c, threads, with_residual, with_norm);
      for (bool weighted : {false, true}) test_merge_reduce(c, threads, weighted);
      test_masked_prune_merge(c, threads);
      for (bool nonsense : {false, true}) test_masked_prune_merge_backward(c, threads, nonsense);
    }
    test_sort_tokens(kManyTokens, threads);
    test_add_norm(kManyTokens, threads);
    test_prune_merge(kManyTokens, threads, true, true);
    test_masked_prune_merge(kManyTokens, threads);
    for (const Case& c : {kManyTokens, kManyImages, kManyChannels}) test_masked_prune_merge_backward(c, threads, false);
    test_merge_reduce(kManyTokens, threads, true);
    test_merge_reduce({1, 2100, 8, 1, 2090, 700}, threads, true);  // some tokens for each destination
    test_merge_reduce({2, 1200, 8, 1, 1100, 900}, threads, true);
    test_kept_number(5.5f, 2.5f, 3, threads);
    test_kept_number(5, 2.25f, 2, threads);
    test_kept_number(std::nextafter(0.5f, 0.0f), 3, 0, threads);  // a half cannot be added to it exactly
    test_kept_number(NAN, 3, 0, threads);
    test_kept_number(99, 0, 1, threads);  // something to merge into
    test_compression_rate(196, 1, threads);
    test_compression_rate(17, 4, threads);
    test_compression_rate(1, 1, threads);
  }
  return report(diffrate::cpu::kernels().name);
}
