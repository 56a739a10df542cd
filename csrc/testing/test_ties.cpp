// Among destinations whose rows are equal, bit by bit, a source goes to the first: in every dtype, for any number of
// threads and any number of tokens and channels. Rows are what is left after the residual is added and rounded.
#include <numeric>

#include "testing/kernel_cases.h"
#define DIFFRATE_SIMD plain
#include "cpu/dispatch.h"

namespace diffrate::testing {
namespace {

namespace simd = diffrate::cpu::plain;

enum class Kind { identical, duplicated };

// Which token each token is a copy of.
std::vector<int64_t> copies(const Case& c, Kind kind, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<int64_t> result(c.images * c.tokens);
  const int64_t distinct = kind == Kind::identical ? 1 : 1 + c.tokens / 4;
  for (int64_t& from : result) from = static_cast<int64_t>(generator() % static_cast<unsigned>(distinct));
  return result;
}

// Random rows, of which token i of an image has row `from[i]`.
template <class T>
std::unique_ptr<T[]> rows_of(const Case& c, const std::vector<int64_t>& from, unsigned seed) {
  auto random = random_floats(c.images * c.tokens * c.channels, seed, -2, 2);
  auto rows = exact<T>(c.images * c.tokens * c.channels);
  for (int64_t b = 0; b < c.images; ++b)
    for (int64_t i = 0; i < c.tokens; ++i)
      for (int64_t k = 0; k < c.channels; ++k) {
        T& value = rows[((b * c.tokens + i) * c.channels) + k];
        simd::store_some(&value,
                         simd::Vec<simd::Wide<T>>{} +
                             simd::Wide<T>(random[(b * c.tokens + from[b * c.tokens + i]) * c.channels + k]),
                         1);
      }
  return rows;
}

template <class T>
void test(Type type, const Case& c, Kind kind, bool with_residual, const cpu::Threads& threads) {
  const unsigned seed = static_cast<unsigned>(c.tokens * 1000 + c.channels);
  const auto from = copies(c, kind, seed);
  const auto x = rows_of<T>(c, from, seed + 1), residual = rows_of<T>(c, from, seed + 2);
  const auto importance = random_floats(c.images * (c.tokens - c.prefix), seed + 3);
  auto out = exact<T>(c.images * c.k_m * c.channels);
  auto out_size = exact<simd::Wide<T>>(c.images * c.k_m);
  auto slot = exact<int64_t>(c.images * c.tokens);
  cpu::kernels().prune_merge({.type = type,
                              .images = c.images,
                              .tokens = c.tokens,
                              .channels = c.channels,
                              .prefix = c.prefix,
                              .k_p = c.k_p,
                              .k_m = c.k_m,
                              .x = tokens_of(x.get(), c),
                              .residual = tokens_of(with_residual ? residual.get() : nullptr, c),
                              .importance = given(importance.get(), c),
                              .size = {},
                              .weighted_mean = false,
                              .cosine_sizes = true,
                              .out = out.get(),
                              .out_size = out_size.get(),
                              .slot = slot.get()},
                             threads);
  bool good = true;
  for (int64_t b = 0; b < c.images; ++b) {
    std::vector<int64_t> order(c.tokens);
    std::iota(order.begin(), order.end(), 0);
    const float* scores = importance.get() + b * (c.tokens - c.prefix) - c.prefix;
    std::stable_sort(order.begin() + c.prefix, order.end(),
                     [&](int64_t i, int64_t j) { return scores[i] > scores[j]; });
    auto row_at = [&](int64_t position) { return from[b * c.tokens + order[position]]; };
    for (int64_t source = c.k_m; source < c.k_p; ++source) {
      const int64_t to = slot[b * c.tokens + order[source]];
      good = good && to >= c.prefix && to < c.k_m;
      for (int64_t before = c.prefix; good && before < to; ++before) good = row_at(before) != row_at(to);
    }
  }
  const char* types[] = {"float32", "float64", "float16", "bfloat16"};
  check(good,
        std::string("ties: ") + (kind == Kind::identical ? "identical" : "duplicated") + " tokens in " +
            types[static_cast<int>(type)] + (with_residual ? " with residual, " : ", ") +
            std::to_string(threads.count) + " threads, k_p = " + std::to_string(c.k_p) +
            ", k_m = " + std::to_string(c.k_m),
        c.tokens, c.channels);
}

}  // namespace
}  // namespace diffrate::testing

int main() {
  using namespace diffrate;
  using namespace diffrate::testing;
  say_what_runs();
  for (int64_t n : {5, 18, 67})
    for (int64_t channels : {1, 3, 8, 37, 64})
      for (int64_t k_m : {n / 2, n - 2})  // many sources and few
        for (Kind kind : {Kind::identical, Kind::duplicated})
          for (bool with_residual : {false, true})
            for (const cpu::Threads& threads : pools()) {
              const Case c{.images = 2, .tokens = n, .channels = channels, .prefix = 1, .k_p = n - 1, .k_m = k_m};
              for (Type type : {Type::f32, Type::f64, Type::f16, Type::bf16})
                cpu::plain::dispatch(
                    type, [&](auto example) { test<decltype(example)>(type, c, kind, with_residual, threads); });
            }
  return report(cpu::kernels().name);
}
