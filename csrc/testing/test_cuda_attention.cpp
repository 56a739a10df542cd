// Tests of the CUDA kernels of class_attention, received_attention, proportional_attention and masked_attention on the
// emulated device: values against plain loops in double, in several orders of threads.
#include <numeric>

#include "testing/attention_expected.h"

namespace diffrate::cuda {
namespace {

enum class Operator { class_attention, received_attention, proportional_attention, masked_attention };

const char* start(Operator which, const AttentionArgs& args) {
  using testing::run_cuda;
  switch (which) {
    case Operator::class_attention: return run_cuda(&Kernels::class_attention, args);
    case Operator::received_attention: return run_cuda(&Kernels::received_attention, args);
    case Operator::proportional_attention: return run_cuda(&Kernels::proportional_attention, args);
    case Operator::masked_attention: return run_cuda(&Kernels::masked_attention, args);
  }
  return "no such operator";
}

template <class T>
Results<T, Wide<T>> run(Operator which, AttentionArgs args, Measure measure, const emulation::Schedule& schedule) {
  Results<T, Wide<T>> results(args, NAN);
  args.out = results.out.get();
  args.importance = measure == Measure::none ? nullptr : results.importance.get();
  args.received = measure == Measure::received;
  emulation::schedule() = schedule;
  const char* error = start(which, args);
  check(error == nullptr, error ? error : "launched");
  return results;
}

// Nothing is written that is not wanted.
template <class N>
bool untouched(const N* numbers, int64_t count) {
  return std::all_of(numbers, numbers + count, [](N number) { return std::isnan(to_wide(number)); });
}

// The class token's rows, where they are wanted instead of their mean over heads: they have that mean, bit by bit, and
// are whole rows.
template <class T>
void check_rows(AttentionArgs args, const Results<T, Wide<T>>& with_mean, const emulation::Schedule& schedule,
                const std::string& label) {
  using W = Wide<T>;
  Results<T, W> results(args, NAN);
  auto rows = exact<W>(args.images * args.heads * args.tokens, W(NAN));
  args.out = results.out.get();
  args.importance = rows.get();
  args.by_head = true;
  emulation::schedule() = schedule;
  const char* error = start(Operator::proportional_attention, args);
  check(error == nullptr, error ? error : "launched");
  auto row = [&](int64_t image, int64_t head) { return rows.get() + (image * args.heads + head) * args.tokens; };
  for (int64_t b = 0; b < args.images; ++b) {
    for (int64_t j = args.prefix; j < args.tokens; ++j) {
      W sum = 0;
      for (int64_t h = 0; h < args.heads; ++h) sum += row(b, h)[j];
      results.importance[b * (args.tokens - args.prefix) + j - args.prefix] = sum / static_cast<W>(args.heads);
    }
    for (int64_t h = 0; h < args.heads; ++h)
      check(std::abs(std::accumulate(row(b, h), row(b, h) + args.tokens, W(0)) - 1) < 1e-4, "a whole row: " + label);
  }
  check(results.same(with_mean), "rows by head: " + label);
}

template <class T>
void test(const Case& c, int64_t prefix, Measure measure, unsigned seed) {
  Inputs<T> inputs(c, seed);
  inputs.args.prefix = prefix;
  const char* measures[] = {"none", "class", "received"};
  const std::string name = "type " + std::to_string(int(kType<T>)) + ", " + c.name() + ", importance " +
                           measures[int(measure)] + ", P = " + std::to_string(prefix);
  Expected<T> plain(inputs, false, measure), masked(inputs, true, measure);
  for (Operator which : {Operator::class_attention, Operator::received_attention, Operator::proportional_attention,
                         Operator::masked_attention}) {
    if (which == Operator::class_attention && measure != Measure::of_class) continue;
    if (which == Operator::received_attention && measure != Measure::received) continue;
    const std::string label = "operator " + std::to_string(int(which)) + ", " + name;
    const Expected<T>& expected = which == Operator::masked_attention ? masked : plain;
    auto results = run<T>(which, inputs.args, measure, kSchedules[seed % 3]);
    if (which >= Operator::proportional_attention)
      expected.check_out(results, label);
    else
      check(untouched(results.out.get(), results.count), "out is not written: " + label);
    if (which == Operator::proportional_attention && measure == Measure::of_class)
      check_rows<T>(inputs.args, results, kSchedules[seed % 3], label);
    if (measure != Measure::none)
      expected.check_importance(results, label);
    else
      check(untouched(results.importance.get(), results.patches), "importance is not written: " + label);
    if (c.tokens < 100) {
      auto again = run<T>(which, inputs.args, measure, kSchedules[(seed + 1) % 3]);
      check(results.same(again), "the same in another order of threads: " + label);
    }
  }
}

// What has a kernel of its own, or an own way through it, for this many images or tokens.
template <class T>
void test_alone(Operator which, Measure measure, const Case& c, unsigned seed) {
  Inputs<T> inputs(c, seed);
  inputs.args.prefix = 1;
  const std::string label =
      "operator " + std::to_string(int(which)) + " alone, type " + std::to_string(int(kType<T>)) + ", " + c.name();
  const Expected<T> expected(inputs, false, measure);
  const auto first = run<T>(which, inputs.args, measure, kSchedules[0]);
  expected.check_importance(first, label);
  for (int i = 1; i < 3; ++i)
    check(first.same(run<T>(which, inputs.args, measure, kSchedules[i])), "the same in another order: " + label);
}

// NaN in one image does not change another; a NaN query leaves the other queries as they are.
template <class T>
void test_nan() {
  Case c{2, 2, 83, 16, Layout::contiguous, Mask::fractions, true};
  for (Operator which : {Operator::class_attention, Operator::received_attention, Operator::proportional_attention,
                         Operator::masked_attention})
    for (Measure measure : {Measure::of_class, Measure::received})
      for (int input = 0; input < 3; ++input) {
        const bool has_out = which >= Operator::proportional_attention;
        if (!has_out && (which == Operator::class_attention) != (measure == Measure::of_class)) continue;
        Inputs<T> inputs(c, 5);
        auto before = run<T>(which, inputs.args, measure, kSchedules[0]);
        const auto& a = inputs.args;
        const Heads* heads[] = {&a.q, &a.k, &a.v};
        inputs.at(*heads[input], 1, 1, 0, 3) = from_wide<T>(NAN);
        auto after = run<T>(which, inputs.args, measure, kSchedules[0]);
        std::string name = "NaN in input " + std::to_string(input) + ", type " + std::to_string(int(kType<T>));
        check(after.same(before, 1, 2), name + " changed another image");
        for (int64_t i = 0; i < c.tokens; ++i) {
          const int64_t at = ((c.tokens + i) * 2 + 1) * c.head_dim + 3;
          if (has_out) check(std::isnan(to_wide(after.out[at])) == (input > 0 || i == 0), name + ": out");
          check(std::isnan(after.importance[c.tokens + i]) == (input < 2), name + ": importance");
        }
      }
}

// Keys with logits of -inf receive nothing, also where they are all that one of two warps has. The kernel for other
// types lets zeros in the place of missing queries meet them.
template <class T>
void test_infinite_keys() {
  const Case c{1, 1, 40, 16, Layout::contiguous, Mask::ones, true};
  for (auto [which, measure] : {std::pair{Operator::class_attention, Measure::of_class},
                                std::pair{Operator::received_attention, Measure::received}}) {
    if (which == Operator::received_attention && sizeof(T) > 2) continue;
    Inputs<T> inputs(c, 1);
    for (int64_t i = 0; i < c.tokens; ++i)
      for (int64_t d = 0; d < c.head_dim; ++d) {
        inputs.at(inputs.args.q, 0, 0, i, d) = from_wide<T>(1);
        if (i >= 32) inputs.at(inputs.args.k, 0, 0, i, d) = from_wide<T>(-INFINITY);
      }
    auto results = run<T>(which, inputs.args, measure, kSchedules[0]);
    double sum = 0, hidden = 0;
    for (int64_t i = 0; i < c.tokens; ++i) (i < 32 ? sum : hidden) += double(results.importance[i]);
    check(std::abs(sum - 1) < 1e-5 && hidden == 0, "keys of -inf, operator " + std::to_string(int(which)));
  }
}

template <class T>
void test_type() {
  unsigned seed = 0;
  for (int64_t tokens : {1, 17, 70, 197})
    for (int64_t head_dim : {8, 33, 64, 80, 128})
      for (Measure measure : {Measure::none, Measure::of_class, Measure::received}) {
        ++seed;
        if (head_dim > kWidestHead<T>) continue;
        const bool few = tokens < 100;
        Case c{few ? 2 : 1, few ? 2 : 1, tokens, head_dim, Layout((seed / 2) % 3), Mask(seed / 3 % 3), seed % 2 == 0};
        // the types share the larger cases
        if (tokens < 50 || (seed + unsigned(kType<T>)) % 3 == 0) test<T>(c, seed % 2, measure, seed);
      }
  for (int layout = 0; layout < 3; ++layout)
    for (int mask = 0; mask < 3; ++mask)
      for (Measure measure : {Measure::of_class, Measure::received})
        test<T>({1, 3, 37, 16, Layout(layout), Mask(mask), true}, 1, measure, 7);
  test<T>({0, 2, 8, 16, Layout::contiguous, Mask::ones, false}, 0, Measure::of_class, 1);
  test<T>({2, 2, 8, 16, Layout::contiguous, Mask::ones, false}, 8, Measure::received, 1);  // no patches
  for (int layout = 0; layout < 3; ++layout)  // an image's heads in one block
    for (int64_t head_dim : {24, 64, 80, 130})
      test_alone<T>(Operator::class_attention, Measure::of_class,
                    {9, 5, 37, head_dim, Layout(layout), Mask::ones, layout > 0}, 4);
  if constexpr (sizeof(T) == 2)  // a head in one block: keys for full and half empty groups, and one too many
    for (int64_t tokens : {16, 33, 120, 225, 257, 288, 289})
      test_alone<T>(Operator::received_attention, Measure::received,
                    {1, 1, tokens, tokens % 2 == 0 ? 64 : 80, Layout(tokens % 3), Mask::ones, tokens != 120}, 5);
  test_nan<T>();
  test_infinite_keys<T>();
}

template <class T>
void test_refused(const char* expected) {
  Inputs<T> inputs({1, 1, 3, kWidestHead<T> + 1, Layout::contiguous, Mask::ones, false}, 1);
  for (Operator which : {Operator::received_attention, Operator::proportional_attention, Operator::masked_attention}) {
    const char* error = start(which, inputs.args);
    check(error != nullptr && std::string(error) == expected, "wide heads are refused");
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
  // heads too many for one block, rows too long for shared memory
  test_alone<float>(Operator::class_attention, Measure::of_class, {9, 97, 3, 4, Layout::packed, Mask::ones, true}, 5);
  test_alone<float>(Operator::class_attention, Measure::of_class, {1, 1, 6200, 4, Layout::packed, Mask::ones, true}, 5);
  test_refused<float>("the CUDA kernels take heads of at most 128 channels");
  test_refused<double>("the CUDA kernels take heads of at most 64 channels in float64");
  return diffrate::testing::report("CUDA attention");
}
