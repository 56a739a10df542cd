// The plans of prune_merge on CUDA (csrc/cuda/prune_merge_plan.cuh), on the emulated device: whichever runs, all
// results are the same, bit by bit but for the sizes, to which cosines are added. What is right, other tests say.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cuda/prune_merge_plan.cuh"
#include "testing/cuda_kernels.h"
#include "testing/kernel_cases.h"

namespace diffrate::testing {
namespace {

void choose(const std::string& plan) { setenv("DIFFRATE_PRUNE_MERGE_PLAN", plan.c_str(), 1); }

std::string error_of(const char* error) { return error == nullptr ? "" : error; }

// What differs between calls of one shape.
struct Options {
  bool residual, weighted, sizes, cosine_sizes;
  enum class Scores { given, half, heads, ties, rows, mean_of_rows } scores;
  bool not_numbers;        // among the features
  int64_t row_heads = 12;  // of rows
};

template <class T>
std::unique_ptr<T[]> random_numbers(int64_t count, unsigned seed, float low = -1, float high = 1) {
  auto floats = random_floats(count, seed, low, high);
  auto numbers = exact<T>(count);
  for (int64_t i = 0; i < count; ++i) numbers[i] = T(floats[i]);
  return numbers;
}

template <class T>
class Call {
 public:
  Call(Type type, const Case& c, const Options& options)
      : c_(c),
        options_(options),
        type_(type),
        x_(random_numbers<T>(elements(), 1)),
        residual_(random_numbers<T>(elements(), 2)),
        importance_(random_floats(c.images * patches(), 3)),
        heads_(random_numbers<T>(c.images * 3 * patches(), 4)),
        rows_(random_floats(c.images * options.row_heads * c.tokens, 6, 0, 1)),
        size_(random_floats(c.images * c.tokens, 5, 0.5f, 3)) {
    if (options.scores == Options::Scores::ties)
      for (int64_t i = 0; i < c.images * patches(); ++i)
        importance_[i] = i % 11 == 3 ? NAN : i % 7 == 2 ? -0.0f : i % 7 == 5 ? 0.0f : std::floor(importance_[i] * 4);
    for (int64_t i = 0; i < c.images; ++i)
      for (int64_t j = c.prefix + 3; j < c.tokens; ++j)
        for (int64_t h = 0; h < options.row_heads; ++h) {
          const int64_t next = (h + 1) % options.row_heads;
          if (j % 6 == 0) row(i, h)[j] = row(i, h)[j - 3];     // a tie, if all heads count
          if (j % 3 == 1) row(i, h)[j] = row(i, next)[j - 1];  // nearly one: the order in which they are added up tells
          if (j % 15 == 8 && h == j / 15 % options.row_heads) row(i, h)[j] = NAN;
        }
    for (int64_t i = 0; i < c.images; ++i)
      for (int64_t j = c.prefix; options.scores == Options::Scores::mean_of_rows && j < c.tokens; ++j) {
        float sum = 0;  // as cuda/head_mean.cu has it
        for (int64_t h = 0; h < options.row_heads; ++h) sum += row(i, h)[j];
        importance_[i * patches() + j - c.prefix] = sum / static_cast<float>(options.row_heads);
      }
    if (options.not_numbers)  // some tokens, a whole one, and zeros
      for (int64_t i = 0; i < elements(); i += 7 * c.channels + 1) x_[i] = T(NAN);
    if (options.not_numbers)
      for (int64_t i = 0; i < c.channels; ++i) x_[2 * c.channels + i] = residual_[2 * c.channels + i] = T(0);
  }

  struct Results {
    std::unique_ptr<T[]> out;
    std::unique_ptr<cuda::Wide<T>[]> size;
    std::unique_ptr<int64_t[]> slot;
  };

  std::string run(Results& results) const {
    int64_t rows = c_.images * c_.k_m;
    results = {exact<T>(rows * c_.channels, T(77)), exact<cuda::Wide<T>>(rows, 77),
               exact<int64_t>(c_.images * c_.tokens, -77)};
    Importance importance = given(importance_.get(), c_);
    if (options_.scores == Options::Scores::half || options_.scores == Options::Scores::heads)
      importance = {.data = heads_.get(),
                    .type = type_,
                    .heads = options_.scores == Options::Scores::heads ? 3 : 1,
                    .queries = 1,
                    .stride_image = 3 * patches(),
                    .stride_head = patches(),
                    .stride_query = 0,
                    .stride_token = 1};
    if (options_.scores == Options::Scores::rows)
      importance = {.data = rows_.get() + c_.prefix,
                    .type = Type::f32,
                    .heads = options_.row_heads,
                    .queries = 1,
                    .stride_image = options_.row_heads * c_.tokens,
                    .stride_head = c_.tokens,
                    .stride_query = 0,
                    .stride_token = 1};
    return error_of(run_cuda<PruneMergeArgs>(&cuda::Kernels::prune_merge,
                                             {.type = type_,
                                              .images = c_.images,
                                              .tokens = c_.tokens,
                                              .channels = c_.channels,
                                              .prefix = c_.prefix,
                                              .k_p = c_.k_p,
                                              .k_m = c_.k_m,
                                              .x = tokens_of(x_.get(), c_),
                                              .residual = tokens_of(options_.residual ? residual_.get() : nullptr, c_),
                                              .importance = importance,
                                              .size = options_.sizes ? vector_of(size_.get(), c_) : Vector{},
                                              .weighted_mean = options_.weighted,
                                              .cosine_sizes = options_.cosine_sizes,
                                              .out = results.out.get(),
                                              .out_size = results.size.get(),
                                              .slot = results.slot.get()}));
  }

  // What differs, or nothing.
  std::string difference(const Results& got, const Results& want) const {
    int64_t rows = c_.images * c_.k_m, slots = c_.images * c_.tokens;
    for (int64_t i = 0; i < slots; ++i)
      if (got.slot[i] != want.slot[i])
        return "slot " + std::to_string(i) + " is " + std::to_string(got.slot[i]) + ", not " +
               std::to_string(want.slot[i]);
    for (int64_t i = 0; i < rows * c_.channels; ++i) {
      cuda::Wide<T> one = got.out[i], other = want.out[i];
      if (one != other && !(std::isnan(one) && std::isnan(other))) return "feature " + std::to_string(i);
    }
    for (int64_t i = 0; i < rows; ++i)
      if (!near(got.size[i], want.size[i]) && !(std::isnan(got.size[i]) && std::isnan(want.size[i])))
        return "size " + std::to_string(i);
    return "";
  }

 private:
  int64_t patches() const { return c_.tokens - c_.prefix; }
  float* row(int64_t image, int64_t head) const {
    return rows_.get() + (image * options_.row_heads + head) * c_.tokens;
  }
  int64_t elements() const { return c_.images * c_.tokens * c_.channels; }

  const Case c_;
  const Options options_;
  const Type type_;
  std::unique_ptr<T[]> x_, residual_;
  std::unique_ptr<float[]> importance_;
  std::unique_ptr<T[]> heads_;
  std::unique_ptr<float[]> rows_;  // (B, H, N)
  std::unique_ptr<float[]> size_;
};

// Runs every plan. Of half precision `channels` tells which number of parts must be able to run: these and more.
template <class T>
void test_plans(Type type, const Case& c, const Options& options, int fewest_channel_parts) {
  if constexpr (sizeof(T) == 8) return;  // its sizes are double: tests of one plan do
  Call<T> call(type, c, options);
  typename Call<T>::Results want, got;
  choose("rows-1!");
  check(call.run(want).empty(), "prune_merge: rows-1 runs", c.tokens, c.channels);
  for (const cuda::Choice& choice : cuda::kChoices) {
    bool must_run = choice.plan.kernel == cuda::Plan::Kernel::rows || choice.plan.parts >= fewest_channel_parts;
    choose(choice.name + std::string("!"));
    std::string what = std::string("prune_merge: ") + choice.name + ", dtype " +
                       std::to_string(static_cast<int>(type)) + ", scores " +
                       std::to_string(static_cast<int>(options.scores)) + (options.residual ? ", residual" : "") +
                       (options.weighted ? ", weighted" : "") + (options.not_numbers ? ", NaN" : "");
    std::string error = call.run(got);
    check(error.empty() == must_run, what + (must_run ? " runs: " + error : " refuses"), c.tokens, c.channels);
    if (!must_run) {  // without the exclamation mark another one runs
      choose(choice.name);
      check(call.run(got).empty(), what + " gives way", c.tokens, c.channels);
    }
    std::string difference = call.difference(got, want);
    check(difference.empty(), what + ": " + difference, c.tokens, c.channels);
  }
}

constexpr int kNone = 99;  // more parts than there are

void test_all_plans() {
  using Scores = Options::Scores;
  const Options plain{false, false, true, true, Scores::given, false},
      residual{true, true, true, false, Scores::half, false};
  const Options heads{true, false, false, true, Scores::heads, false},
      ties{false, true, true, true, Scores::ties, false};
  const Options not_numbers{true, false, true, true, Scores::given, true};
  struct Shape {
    Case c;
    int fewest_channel_parts;
  };
  const Shape shapes[] = {
      {{2, 17, 24, 1, 12, 8}, 2},         {{3, 5, 8, 2, 4, 3}, 2},            // fewer chunks than parts
      {{1, 65, 384, 1, 60, 33}, 2},       {{2, 40, 136, 1, 39, 2}, 2},        // one destination
      {{1, 130, 64, 1, 100, 37}, 2},      {{1, 130, 64, 1, 120, 37}, kNone},  // 63 sources, and too many
      {{1, 197, 160, 0, 165, 148}, 2},    {{1, 512, 32, 1, 400, 390}, 2},     // as many tokens as threads
      {{1, 513, 32, 1, 400, 390}, kNone}, {{2, 9, 16, 1, 1, 1}, kNone},       // no sources
      {{1, 33, 20, 1, 30, 20}, kNone},                                        // rows that are not aligned
  };
  for (const auto& [c, parts] : shapes)
    for (const Options& options : {plain, residual, heads, ties, not_numbers}) {
      test_plans<__nv_bfloat16>(Type::bf16, c, options, parts);
      test_plans<__half>(Type::f16, c, options, parts);
      if (!options.weighted) test_plans<float>(Type::f32, c, options, kNone);
    }
  // rows that fill shared memory: with the residual beside them, and without
  test_plans<__nv_bfloat16>(Type::bf16, {1, 197, 768, 1, 165, 148}, heads, 8);
  test_plans<__nv_bfloat16>(Type::bf16, {1, 197, 640, 1, 165, 148}, heads, 4);
}

// Rows of all heads sort exactly as their mean does, which head_mean would give, whichever plan runs.
template <class T>
void test_rows(Type type) {
  const Case shapes[] = {{2, 70, 24, 1, 60, 41}, {1, 197, 16, 2, 165, 148}, {1, 513, 16, 1, 400, 390}};
  for (const Case& c : shapes)
    for (int64_t heads : {1, 2, 3, 4, 5, 8, 12, 13, 16, 17, 24, 40}) {
      if (c.tokens > 500 && heads != 16) continue;
      Options options{false, false, true, true, Options::Scores::mean_of_rows, false, heads};
      typename Call<T>::Results want, got;
      Call<T> of_mean(type, c, options);
      options.scores = Options::Scores::rows;
      Call<T> of_rows(type, c, options);
      choose("rows-1!");
      check(of_mean.run(want).empty(), "prune_merge: the mean of rows", c.tokens, heads);
      for (const cuda::Choice& choice : cuda::kChoices) {
        choose(choice.name);
        std::string error = of_rows.run(got), difference = of_rows.difference(got, want);
        check(
            error.empty() && difference.empty(),
            std::string("prune_merge: ") + choice.name + ", " + std::to_string(heads) + " heads: " + error + difference,
            c.tokens, c.channels);
      }
    }
}

void test_names() {
  Call<float> call(Type::f32, {1, 17, 24, 1, 12, 8}, {});
  Call<float>::Results results;
  choose("rows-3");
  check(call.run(results).starts_with("DIFFRATE_PRUNE_MERGE_PLAN must be one of channels-8, "), "unknown plan");
  choose("!");
  check(!call.run(results).empty(), "a plan without a name");
  choose("");
  check(call.run(results).empty(), "no plan");
  unsetenv("DIFFRATE_PRUNE_MERGE_PLAN");
  check(call.run(results).empty(), "no variable");
}

// Of 132 multiprocessors. What is measured is in kChoices.
std::string chosen(int64_t images, bool channels) {
  for (const cuda::Choice& choice : cuda::kChoices) {
    bool possible = choice.plan.kernel == cuda::Plan::Kernel::rows || channels;
    if (possible && cuda::fits(choice, images, 132)) return choice.name;
  }
  return "none";
}

void test_choices() {
  struct Expected {
    int64_t images;
    const char *channels, *rows;
  };
  const Expected all[] = {{1, "channels-8", "rows-8"},
                          {8, "channels-8", "rows-8"},
                          {16, "channels-4", "rows-4"},
                          {32, "channels-2", "rows-2"},
                          {64, "rows-2", "rows-2"},
                          {128, "rows-2-paired", "rows-2-paired"},
                          {256, "rows-1-paired", "rows-1-paired"}};
  for (const Expected& expected : all) {
    check(chosen(expected.images, true) == expected.channels, "plan of " + std::to_string(expected.images) + " images");
    check(chosen(expected.images, false) == expected.rows,
          "plan without channels of " + std::to_string(expected.images) + " images");
  }
}

}  // namespace
}  // namespace diffrate::testing

int main() {
  diffrate::testing::test_names();
  diffrate::testing::test_choices();
  diffrate::testing::test_rows<__nv_bfloat16>(diffrate::Type::bf16);
  diffrate::testing::test_rows<__half>(diffrate::Type::f16);
  diffrate::testing::test_rows<float>(diffrate::Type::f32);
  diffrate::testing::test_all_plans();
  return diffrate::testing::report("plans of prune_merge");
}
