// bipartite_match: every source that merges is with its most similar destination, those that merge are the most similar
// ones, of equal rows the first counts, and slots follow from that. In every dtype, with and without a mean over heads.
#include "common/bipartition.h"
#include "testing/kernel_cases.h"
#define DIFFRATE_SIMD plain
#include "cpu/dispatch.h"

namespace diffrate::testing {
namespace {

namespace simd = diffrate::cpu::plain;

struct MatchCase {
  int64_t images, heads, tokens, channels, prefix, merged;
  bool copies;  // of few rows, bit by bit
};

template <class T>
T rounded(double value) {
  T result;
  simd::store_some(&result, simd::Vec<simd::Wide<T>>{} + simd::Wide<T>(value), 1);
  return result;
}

// What cosines may be wrong by: means that are rounded to T may fall on the other side.
template <class T>
double tolerance(const MatchCase& c) {
  double wide = sizeof(T) == 8 ? 1e-13 : 1e-5;
  return c.heads == 1 || sizeof(T) > 2 ? wide : std::is_same_v<T, simd::Half> ? 2e-3 : 2e-2;
}

template <class T>
void test(Type type, const MatchCase& c, const cpu::Threads& threads) {
  std::mt19937 generator(static_cast<unsigned>(c.tokens * 1000 + c.channels));
  auto random = random_floats(c.images * c.heads * c.tokens * c.channels, 1, -2, 2);
  // which token of its image each token is a copy of
  std::vector<int64_t> from(c.images * c.tokens);
  for (int64_t i = 0; i < c.images * c.tokens; ++i)
    from[i] = c.copies ? static_cast<int64_t>(generator() % static_cast<unsigned>(1 + c.tokens / 4)) : i % c.tokens;
  const int64_t head = c.tokens * c.channels;
  auto at = [&](int64_t b, int64_t h, int64_t token, int64_t k) {
    return (b * c.heads + h) * head + token * c.channels + k;
  };
  auto keys = exact<T>(c.images * c.heads * head);
  for (int64_t b = 0; b < c.images; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.tokens; ++i)
        for (int64_t k = 0; k < c.channels; ++k)
          keys[at(b, h, i, k)] = rounded<T>(random[at(b, h, from[b * c.tokens + i], k)]);
  auto slot = exact<int64_t>(c.images * c.tokens, int64_t{-7});
  const BipartiteMatchArgs args{
      .type = type,
      .images = c.images,
      .heads = c.heads,
      .tokens = c.tokens,
      .head_dim = c.channels,
      .prefix = c.prefix,
      .merged = c.merged,
      .keys = {.data = keys.get(), .stride_image = c.heads * head, .stride_head = head, .stride_token = c.channels},
      .slot = slot.get()};
  cpu::kernels().bipartite_match(args, threads);

  const Bipartition split = bipartition(args);
  bool placed = true, matched = true, first = true, chosen = true;
  for (int64_t b = 0; b < c.images; ++b) {
    const int64_t *to = slot.get() + b * c.tokens, *row = from.data() + b * c.tokens;
    for (int64_t j = 0; j < c.prefix; ++j) placed = placed && to[j] == j;
    for (int64_t j = 0; j < split.destinations; ++j)
      placed = placed && to[split.first_destination + 2 * j] == split.first_is_merged_into + j;
    std::vector<double> unit(head);
    for (int64_t i = 0; i < c.tokens; ++i) {
      double squares = 0;
      for (int64_t k = 0; k < c.channels; ++k) {
        double sum = 0;
        for (int64_t h = 0; h < c.heads; ++h) sum += double(simd::to_wide(keys[at(b, h, i, k)]));
        unit[i * c.channels + k] = double(simd::to_wide(rounded<T>(sum / double(c.heads))));
        squares += unit[i * c.channels + k] * unit[i * c.channels + k];
      }
      for (int64_t k = 0; k < c.channels; ++k) unit[i * c.channels + k] /= std::sqrt(squares);
    }
    auto cosine = [&](int64_t i, int64_t j) {
      double sum = 0;
      for (int64_t k = 0; k < c.channels; ++k) sum += unit[i * c.channels + k] * unit[j * c.channels + k];
      return sum;
    };
    double least_merging = INFINITY, most_staying = -INFINITY;
    int64_t stays = 0;
    std::vector<bool> left_out(c.tokens);  // rows of which a copy stays
    for (int64_t i = split.first_source; i < c.tokens; i += 2) {
      double best = -INFINITY;
      for (int64_t j = split.first_destination; j < c.tokens; j += 2) best = std::fmax(best, cosine(i, j));
      if (to[i] == c.prefix + stays && to[i] < split.first_is_merged_into) {
        ++stays;
        left_out[row[i]] = true;
        most_staying = std::fmax(most_staying, best);
        continue;
      }
      if (left_out[row[i]]) first = false;
      least_merging = std::fmin(least_merging, best);
      const int64_t j = split.first_destination + 2 * (to[i] - split.first_is_merged_into);
      if (to[i] < split.first_is_merged_into || j >= c.tokens) {
        placed = false;
        continue;
      }
      matched = matched && cosine(i, j) >= best - tolerance<T>(c);
      for (int64_t before = split.first_destination; before < j; before += 2) first = first && row[before] != row[j];
    }
    placed = placed && stays == split.sources - c.merged;
    chosen = chosen && least_merging >= most_staying - tolerance<T>(c);
  }
  const char* types[] = {"float32", "float64", "float16", "bfloat16"};
  const std::string what = std::string(types[static_cast<int>(type)]) + ", " + std::to_string(c.merged) + " of " +
                           std::to_string(c.heads) + " heads, " + std::to_string(threads.count) + " threads";
  check(placed, "bipartite_match: slots, " + what, c.tokens, c.channels);
  check(matched, "bipartite_match: destinations, " + what, c.tokens, c.channels);
  check(chosen, "bipartite_match: sources, " + what, c.tokens, c.channels);
  check(first, "bipartite_match: the first of equal ones, " + what, c.tokens, c.channels);
}

void test_in_every_type(const MatchCase& c, const cpu::Threads& threads) {
  for (Type type : {Type::f32, Type::f64, Type::f16, Type::bf16})
    cpu::plain::dispatch(type, [&](auto example) { test<decltype(example)>(type, c, threads); });
}

}  // namespace
}  // namespace diffrate::testing

int main() {
  using namespace diffrate::testing;
  say_what_runs();
  for (const auto& threads : pools()) {
    for (int64_t tokens : {1, 2, 5, 18, 67})
      for (int64_t channels : {1, 3, 8, 37, 64})
        for (int64_t heads : {1, 3, 6})
          for (bool copies : {false, true}) {
            const int64_t prefix = tokens % 4 < tokens ? tokens % 4 : 0;
            const int64_t most = tokens / 2 > prefix / 2 ? (tokens + 1) / 2 - (prefix + 1) / 2 : 0;
            for (int64_t merged : {most, most / 2})
              test_in_every_type({2, heads, tokens, channels, prefix, merged, copies}, threads);
          }
    test_in_every_type({1, 2, 197, 64, 1, 40, false}, threads);
    // more than the CUDA kernel keeps in shared memory
    test_in_every_type({2, 2, 760, 120, 1, 100, true}, threads);
    test_in_every_type({0, 2, 8, 8, 1, 2, false}, threads);
  }
  return report(diffrate::cpu::kernels().name);
}
