// Tests of the CUDA kernels of masked_attention_backward on the emulated device: values against plain loops in double,
// in several orders of threads.
#include <cstring>
#include <limits>

#include "testing/attention_cases.h"

namespace diffrate::cuda {
namespace {

// grad_q, grad_k and grad_v (B, N, H, D), grad_mask (B, N).
template <class T, class W>
struct Results {
  int64_t count, count_mask;
  std::unique_ptr<T[]> features[3];
  std::unique_ptr<W[]> mask;

  explicit Results(const AttentionArgs& a, double fill)
      : count(a.images * a.tokens * a.heads * a.head_dim), count_mask(a.images * a.tokens) {
    for (auto& some : features) some = exact<T>(count, from_wide<T>(static_cast<Wide<T>>(fill)));
    mask = exact<W>(count_mask, static_cast<W>(fill));
  }

  static bool same_bits(const void* a, const void* b, int64_t bytes) {
    return std::memcmp(a, b, static_cast<size_t>(bytes)) == 0;
  }
  // Whether the first `part` of `parts` is the same, bit by bit.
  bool same(const Results& other, int64_t part = 1, int64_t parts = 1) const {
    bool good = same_bits(mask.get(), other.mask.get(), count_mask * part / parts * int64_t(sizeof(W)));
    for (int i = 0; i < 3; ++i)
      good = good && same_bits(features[i].get(), other.features[i].get(), count * part / parts * int64_t(sizeof(T)));
    return good;
  }
};

template <class T>
Results<T, Wide<T>> run(AttentionArgs args, const emulation::Schedule& schedule) {
  Results<T, Wide<T>> results(args, NAN);
  args.grad_q = results.features[0].get();
  args.grad_k = results.features[1].get();
  args.grad_v = results.features[2].get();
  args.grad_mask = results.mask.get();
  emulation::schedule() = schedule;
  const char* error = testing::run_cuda(&Kernels::masked_attention_backward, args);
  check(error == nullptr, error ? error : "launched");
  return results;
}

// The gradients in double, and how far a kernel may be from them: what rounding the terms of every sum could do.
template <class T>
struct Expected {
  Results<double, double> values, allowed;

  explicit Expected(Inputs<T>& in) : values(in.args, 0), allowed(in.args, 0) {
    const auto& a = in.args;
    const int64_t n = a.tokens;
    const double narrow = 2 * kRounding<T>, wide = 40 * kRounding<Wide<T>>;
    std::vector<double> logits(n), e(n), change(n);
    for (int64_t b = 0; b < a.images; ++b)
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t i = 0; i < n; ++i) {
          const auto [top, uncertainty] = logits_of_query(in, b, h, i, logits);
          double total = 1e-6, delta = 0, delta_terms = 0;
          auto visible = [&](int64_t j) {
            return i == j ? 1.0 : double(in.mask[b * a.mask.stride_image + j * a.mask.stride_token]);
          };
          for (int64_t j = 0; j < n; ++j) {
            e[j] = std::exp(logits[j] - top);
            total += e[j] * visible(j);
          }
          auto attention = [&](int64_t j) { return (e[j] * visible(j) + 1e-6 / double(n)) / total; };
          std::vector<double> change_terms(n);
          for (int64_t j = 0; j < n; ++j) {
            change[j] = change_terms[j] = 0;
            for (int64_t c = 0; c < a.head_dim; ++c) {
              double term = in.number(a.grad, b, h, i, c) * in.number(a.v, b, h, j, c);
              change[j] += term;
              change_terms[j] += std::abs(term);
            }
            delta += attention(j) * change[j];
            delta_terms += attention(j) * change_terms[j];
          }
          for (int64_t j = 0; j < n; ++j) {
            double slope = e[j] * (change[j] - delta) / total, to_logit = slope * visible(j);
            double mask_terms = e[j] / total * (change_terms[j] + delta_terms) * uncertainty;
            double weaker = a.difference ? total / (total + (1 - visible(j)) * e[j]) : 1;
            if (i != j)
              add(values.mask[b * n + j], weaker * slope, allowed.mask[b * n + j], wide * weaker * mask_terms);
            auto add_to = [&](int result, int64_t row, int64_t c, double term, double error) {
              int64_t at = ((b * n + row) * a.heads + h) * a.head_dim + c;
              add(values.features[result][at], term, allowed.features[result][at], error);
            };
            for (int64_t c = 0; c < a.head_dim; ++c) {
              double q = a.scale * in.number(a.q, b, h, i, c), k = a.scale * in.number(a.k, b, h, j, c);
              double g = in.number(a.grad, b, h, i, c), shown = wide * mask_terms * visible(j);
              add_to(0, i, c, to_logit * k, std::abs(k) * (narrow * std::abs(to_logit) + shown));
              add_to(1, j, c, to_logit * q, std::abs(q) * (narrow * std::abs(to_logit) + shown));
              add_to(2, j, c, attention(j) * g, std::abs(g) * attention(j) * (narrow + wide * uncertainty));
            }
          }
        }
  }

  static void add(double& sum, double term, double& error_sum, double error) {
    sum += term;
    error_sum += error;
  }

  void check_near(const Results<T, Wide<T>>& results, const std::string& name) const {
    const char* names[] = {"grad_q", "grad_k", "grad_v"};
    // half precision has nothing between zero and this
    const double smallest = std::is_same_v<T, __half> ? 0x1p-24 : std::numeric_limits<float>::min();
    for (int i = 0; i < 3; ++i)
      compare(names[i] + (": " + name), values.count, [&](int64_t at) {
        double value = double(to_wide(results.features[i][at])), expected = values.features[i][at];
        return std::abs(value - expected) / (allowed.features[i][at] + kRounding<T> * std::abs(expected) + smallest);
      });
    compare("grad_mask: " + name, values.count_mask, [&](int64_t at) {
      return std::abs(double(results.mask[at]) - values.mask[at]) /
             (allowed.mask[at] + std::numeric_limits<float>::min());
    });
  }

  template <class Error>
  static void compare(const std::string& name, int64_t count, Error error) {
    double worst = 0;
    for (int64_t i = 0; i < count; ++i) {
      double some = error(i);
      if (!(some <= worst)) worst = some;  // NaN is the worst
      if (std::isnan(worst)) break;
    }
    check(worst <= 1, name + ": error of " + std::to_string(worst) + " of what is allowed");
  }
};

template <class T>
void test(const Case& c, unsigned seed) {
  Inputs<T> inputs(c, seed);
  inputs.args.difference = seed / 4 % 2 == 1;
  const std::string name =
      "type " + std::to_string(int(kType<T>)) + ", " + c.name() + (inputs.args.difference ? ", as a difference" : "");
  Expected<T> expected(inputs);
  auto results = run<T>(inputs.args, kSchedules[seed % 3]);
  expected.check_near(results, name);
  if (c.tokens < 100) {
    auto again = run<T>(inputs.args, kSchedules[(seed + 1) % 3]);
    check(results.same(again), "the same in another order of threads: " + name);
  }
}

// What is not finite in one image does not change another; where it does get is where the formulas say.
template <class T>
void test_not_finite(int input, int64_t token, double value) {
  Case c{2, 2, 33, 16, Layout::contiguous, Mask::fractions, true};
  Inputs<T> inputs(c, 5);
  auto before = run<T>(inputs.args, kSchedules[0]);
  const auto& a = inputs.args;
  const Heads* heads[] = {&a.q, &a.k, &a.v, &a.grad};
  inputs.at(*heads[input], 1, 1, token, 3) = from_wide<T>(static_cast<Wide<T>>(value));
  auto after = run<T>(inputs.args, kSchedules[0]);
  std::string name = std::to_string(value) + " in input " + std::to_string(input) + ", token " + std::to_string(token) +
                     ", type " + std::to_string(int(kType<T>));
  check(after.same(before, 1, 2), name + " changed another image");
  // k and v reach every query, and what a query has reaches every key
  auto grad_k = [&](int64_t i, int64_t h, int64_t d) {
    return double(to_wide(after.features[1][((c.tokens + i) * c.heads + h) * c.head_dim + d]));
  };
  bool all_keys = true, other_head = false;
  for (int64_t i = 0; i < c.tokens; ++i)
    for (int64_t d = 0; d < c.head_dim; ++d) {
      all_keys = all_keys && std::isnan(grad_k(i, 1, d));
      other_head = other_head || std::isnan(grad_k(i, 0, d));
    }
  check(all_keys, name + " did not reach the keys' gradients");
  check(!other_head, name + " reached another head");
  // but a query does not reach its own mask
  for (int64_t i = 0; i < c.tokens; ++i) {
    double was = double(before.mask[c.tokens + i]), is = double(after.mask[c.tokens + i]);
    bool own = (input == 0 || input == 3) && i == token;
    check(own ? std::abs(is - was) < 1e-4 * (1 + std::abs(was)) : std::isnan(is), name + ": gradient of the mask");
  }
}

template <class T>
void test_type() {
  unsigned seed = 0;
  for (int64_t tokens : {1, 17, 70, 197})
    for (int64_t head_dim : {8, 33, 64, 80, 128})
      for (int sizes = 0; sizes < 2; ++sizes) {
        ++seed;
        if (head_dim > kWidestHead<T>) continue;
        Case c{tokens < 100 ? 2 : 1,   tokens < 100 ? 2 : 1, tokens,    head_dim,
               Layout((seed / 2) % 3), Mask(seed % 3),       sizes == 1};
        if (tokens < 100 || (seed + unsigned(kType<T>)) % 2 == 0) test<T>(c, seed);
      }
  for (int layout = 0; layout < 3; ++layout)
    for (int mask = 0; mask < 3; ++mask) test<T>({1, 3, 21, 16, Layout(layout), Mask(mask), true}, 7);
  // a loss may be scaled by anything
  for (double gradient : {1e-7, 1e-4, 3e4}) test<T>({1, 1, 40, 16, Layout::packed, Mask::fractions, true, gradient}, 9);
  test<T>({0, 2, 8, 16, Layout::contiguous, Mask::ones, false}, 1);
  for (int64_t token : {0, 20}) {
    for (int input = 0; input < 4; ++input) test_not_finite<T>(input, token, NAN);
    test_not_finite<T>(3, token, INFINITY);
  }
}

}  // namespace
}  // namespace diffrate::cuda

int main() {
  using namespace diffrate::cuda;
  test_type<float>();
  test_type<double>();
  test_type<__half>();
  test_type<__nv_bfloat16>();
  return diffrate::testing::report("CUDA masked_attention_backward");
}
