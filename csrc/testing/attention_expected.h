// What attention kernels must give, by plain loops in double, and how far rounding may take them from it.
#pragma once

#include <limits>

#include "testing/attention_cases.h"

namespace diffrate::cuda {

enum class Measure { none, of_class, received };

// out (B, N, H, D) and importance (B, N-P).
template <class T, class W>
struct Results {
  int64_t count, patches;
  std::unique_ptr<T[]> out;
  std::unique_ptr<W[]> importance;

  explicit Results(const AttentionArgs& a, double fill)
      : count(a.images * a.tokens * a.heads * a.head_dim), patches(a.images * (a.tokens - a.prefix)) {
    out = exact<T>(count, from_wide<T>(static_cast<Wide<T>>(fill)));
    importance = exact<W>(patches, static_cast<W>(fill));
  }

  // Whether the first `part` of `parts` is the same, bit by bit; NaN, which was there before, is the same as NaN.
  bool same(const Results& other, int64_t part = 1, int64_t parts = 1) const {
    auto equal = [](const auto* a, const auto* b, int64_t n) {
      return std::equal(reinterpret_cast<const char*>(a), reinterpret_cast<const char*>(a + n),
                        reinterpret_cast<const char*>(b));
    };
    return equal(out.get(), other.out.get(), count * part / parts) &&
           equal(importance.get(), other.importance.get(), patches * part / parts);
  }
};

// The results in double, and how far a kernel may be from them: what rounding the terms of every sum could do.
template <class T>
struct Expected {
  Results<double, double> values, allowed;

  Expected(Inputs<T>& in, bool masked, Measure measure) : values(in.args, 0), allowed(in.args, 0) {
    const auto& a = in.args;
    const int64_t n = a.tokens;
    const double narrow = std::is_same_v<T, Wide<T>> ? 0 : kRounding<T>, wide = 20 * kRounding<Wide<T>>;
    std::vector<double> logits(n), attention(n);
    for (int64_t b = 0; b < a.images; ++b) {
      auto mask = [&](int64_t j) {
        return masked ? double(in.mask[b * a.mask.stride_image + j * a.mask.stride_token]) : 1.0;
      };
      double queries = 0;
      for (int64_t j = 0; j < n; ++j) queries += mask(j);
      queries = measure == Measure::received ? std::max(queries, kTinySize) : 1;
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t i = 0; i < n; ++i) {
          const auto [top, uncertainty] = logits_of_query(in, b, h, i, logits);
          const double epsilon = masked ? 1e-6 : 0;
          double total = epsilon;
          for (int64_t j = 0; j < n; ++j) {
            attention[j] = std::exp(logits[j] - top) * (i == j ? 1 : mask(j));
            total += attention[j];
          }
          double counts = measure == Measure::received ? mask(i) : i == 0;
          for (int64_t j = 0; j < n; ++j) {
            const double share = (attention[j] + epsilon / double(n)) / total;
            if (j >= a.prefix) {
              const int64_t at = b * (n - a.prefix) + j - a.prefix;
              const double term = share * counts / queries / double(a.heads);
              values.importance[at] += term;
              allowed.importance[at] += wide * uncertainty * term;
            }
            for (int64_t c = 0; c < a.head_dim; ++c) {
              const int64_t at = ((b * n + i) * a.heads + h) * a.head_dim + c;
              const double v = in.number(a.v, b, h, j, c);
              values.out[at] += share * v;
              allowed.out[at] += share * std::abs(v) * (narrow + wide * uncertainty);
            }
          }
        }
    }
  }

  void check_out(const Results<T, Wide<T>>& results, const std::string& name) const {
    compare<T>("out: " + name, results.out.get(), values.out.get(), allowed.out.get(), values.count);
  }
  void check_importance(const Results<T, Wide<T>>& results, const std::string& name) const {
    compare<Wide<T>>("importance: " + name, results.importance.get(), values.importance.get(), allowed.importance.get(),
                     values.patches);
  }

  template <class N>
  static void compare(const std::string& name, const N* actual, const double* expected, const double* allowed,
                      int64_t count) {
    const double smallest = std::is_same_v<N, __half> ? 0x1p-24 : double(std::numeric_limits<float>::min());
    double worst = 0;
    for (int64_t i = 0; i < count && !std::isnan(worst); ++i) {
      double error = std::abs(double(to_wide(actual[i])) - expected[i]) /
                     (allowed[i] + kRounding<N> * std::abs(expected[i]) + smallest);
      if (!(error <= worst)) worst = error;  // NaN is the worst
    }
    check(worst <= 1, name + ": error of " + std::to_string(worst) + " of what is allowed");
  }
};

}  // namespace diffrate::cuda
