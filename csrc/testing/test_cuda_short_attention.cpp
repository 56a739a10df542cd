// Tests of every variant of short_attention.cuh on the emulated device: values against plain loops in double, where the
// base of the exponentials moves, what is not a number, and which variant is chosen.
#include <cstdlib>
#include <cstring>

#include "cuda/short_attention_variants.cuh"
#include "testing/attention_expected.h"
#include "testing/emulation/sanitizer.h"

namespace diffrate::cuda {
namespace {

constexpr const char* kEnvironment = "DIFFRATE_ATTENTION_VARIANT";

void ask_for(const std::string& variant) { setenv(kEnvironment, variant.c_str(), 1); }

struct Form {
  int depth, variants;
};
constexpr Form kForms[] = {{32, static_cast<int>(kShortVariants<32>.size())},
                           {64, static_cast<int>(kShortVariants<64>.size())},
                           {80, static_cast<int>(kShortVariants<80>.size())},
                           {128, static_cast<int>(kShortVariants<128>.size())}};

const Form& form_of(int64_t head_dim) {
  return *std::find_if(std::begin(kForms), std::end(kForms), [&](const Form& f) { return head_dim <= f.depth; });
}

// The order of threads is that of the environment.
template <class T>
Results<T, float> run(AttentionArgs args, bool with_class_row) {
  Results<T, float> results(args, NAN);
  args.out = results.out.get();
  args.importance = with_class_row ? results.importance.get() : nullptr;
  const char* error = testing::run_cuda(&Kernels::proportional_attention, args);
  check(error == nullptr, error ? error : "launched");
  return results;
}

// Multiplies the queries, so that logits spread.
template <class T>
void spread(Inputs<T>& in, double factor) {
  const auto& a = in.args;
  for (int64_t b = 0; b < a.images; ++b)
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < a.tokens; ++i)
        for (int64_t c = 0; c < a.head_dim; ++c)
          in.at(a.q, b, h, i, c) = from_wide<T>(static_cast<float>(factor * in.number(a.q, b, h, i, c)));
}

// Makes the logits of all queries grow from key to key, by `slope` altogether: the base must follow.
template <class T>
void slope(Inputs<T>& in, double slope) {
  const auto& a = in.args;
  for (int64_t b = 0; b < a.images; ++b)
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < a.tokens; ++i) {
        in.at(a.q, b, h, i, 0) = from_wide<T>(8);
        in.at(a.k, b, h, i, 0) = from_wide<T>(static_cast<float>(slope * double(i) / double(a.tokens) / 8 / a.scale));
      }
}

template <class T>
void check_all_variants(Inputs<T>& in, const std::string& what, bool all_splits) {
  const Form& form = form_of(in.args.head_dim);
  const std::string name = what + ", type " + std::to_string(int(kType<T>)) +
                           ", N = " + std::to_string(in.args.tokens) + ", D = " + std::to_string(in.args.head_dim);
  const Expected<T> expected(in, false, Measure::of_class);
  static int turn = 0;  // longer sequences are shared by the variants, and by fewer where sanitizers take their time
  constexpr int kPart = emulation::kAddressSanitizer ? 12 : 3;
  ++turn;
  for (int variant = 0; variant < form.variants; ++variant)
    for (int splits : {1, 2, 3, 4, 7}) {
      if (in.args.tokens > 64 && (variant + turn) % kPart != 0) continue;
      if (splits != (all_splits ? splits : 1 + (variant + turn) % 4)) continue;
      const std::string asked = std::to_string(variant) + "/" + std::to_string(splits);
      ask_for(asked);
      const bool with_class_row = splits != 2;
      const auto results = run<T>(in.args, with_class_row);
      const std::string label = "variant " + asked + ": " + name;
      expected.check_out(results, label);
      if (with_class_row) expected.check_importance(results, label);
    }
}

template <class T>
void test_values() {
  unsigned seed = 0;
  for (int64_t head_dim : {8, 24, 32, 40, 64, 72, 80, 96, 128})
    for (int64_t tokens : {1, 2, 15, 16, 17, 31, 32, 33, 49, 64, 100, 130, 197, 257}) {
      if (++seed % 3 == 0) ++seed;  // every third has a negative scale
      if (tokens > 64 && (seed + unsigned(head_dim)) % 4 > 0 && head_dim % 16 != 0) continue;
      const bool few = tokens <= 33;
      Case c{few ? 2 : 1, few ? 2 : 1, tokens, head_dim, seed % 2 ? Layout::packed : Layout::contiguous,
             Mask::ones,  seed % 4 < 2};
      Inputs<T> in(c, seed);
      in.args.prefix = seed % 2;
      check_all_variants(in, "values", few || tokens == 100);
    }
}

// Logits up to about 1,000, and sizes from the smallest number to a huge one.
template <class T>
void test_extremes() {
  for (int64_t head_dim : {32, 64, 80, 128})
    for (int64_t tokens : {17, 83, 197}) {
      const Case c{1, 1, tokens, head_dim, Layout::packed, Mask::ones, true};
      for (double factor : {10.0, 200.0}) {
        Inputs<T> in(c, 1);
        spread(in, factor);
        check_all_variants(in, "logits times " + std::to_string(factor), false);
      }
      for (double rise : {-1000.0, -30.0, 30.0, 1000.0}) {
        Inputs<T> in(c, 2);
        slope(in, rise);
        check_all_variants(in, "logits rise by " + std::to_string(rise), false);
      }
      Inputs<T> in(c, 4);
      const float sizes[] = {0, -1, 1e-38f, 1e-30f, 1, 1e20f, 3e38f, -INFINITY};
      for (int64_t i = 0; i < tokens; ++i) in.size[i] = sizes[i * 5 % 8];
      check_all_variants(in, "sizes", false);
    }
}

// As the streaming kernel has it: what is not a number reaches the same results.
template <class T>
void test_not_a_number() {
  for (int64_t head_dim : {64, 80})
    for (int input = 0; input < 4; ++input)
      for (float value : {NAN, INFINITY, -INFINITY}) {
        if (input == 3 && std::isinf(value)) continue;  // a size
        Inputs<T> in({2, 2, 83, head_dim, Layout::contiguous, Mask::ones, true}, 5);
        const Heads* heads[] = {&in.args.q, &in.args.k, &in.args.v};
        if (input < 3)
          in.at(*heads[input], 1, 1, 40, 3) = from_wide<T>(value);
        else
          in.size[83 + 40] = value;
        ask_for("streaming");
        const auto expected = run<T>(in.args, true);
        for (int variant = 0; variant < form_of(head_dim).variants; ++variant) {
          ask_for(std::to_string(variant));
          const auto results = run<T>(in.args, true);
          bool same = true;
          for (int64_t i = 0; i < expected.count; ++i)
            same = same && std::isfinite(to_wide(expected.out[i])) == std::isfinite(to_wide(results.out[i]));
          for (int64_t i = 0; i < expected.patches; ++i)
            same = same && std::isfinite(expected.importance[i]) == std::isfinite(results.importance[i]);
          check(same, "variant " + std::to_string(variant) + ", type " + std::to_string(int(kType<T>)) +
                          ", D = " + std::to_string(head_dim) + ": what is not a number, " + std::to_string(value) +
                          " in input " + std::to_string(input));
        }
      }
}

template <class T>
ShortChoice choice(int64_t images, int64_t heads, int64_t tokens, int64_t head_dim, double scale = 0.125) {
  AttentionArgs a{};
  a.type = kType<T>;
  a.images = images;
  a.heads = heads;
  a.tokens = tokens;
  a.head_dim = head_dim;
  a.scale = scale;
  const Heads all{.data = nullptr,
                  .stride_image = tokens * heads * head_dim,
                  .stride_head = head_dim,
                  .stride_token = heads * head_dim};
  a.q = a.k = a.v = all;
  return choose_short_attention(a);
}

void test_choice() {
  using bf16 = __nv_bfloat16;
  unsetenv(kEnvironment);
  check(choice<bf16>(256, 12, 197, 64).variant >= 0, "many short heads");
  check(choice<bf16>(256, 12, 197, 64).splits == 1, "many heads are not divided");
  check(choice<__half>(1, 4, 197, 64).splits == 4, "few heads are");
  check(choice<__half>(0, 4, 197, 64).variant >= 0, "no images");
  check(choice<bf16>(256, 12, 4000, 64).variant < 0, "a long sequence");
  check(choice<bf16>(256, 12, 197, 60).variant < 0, "rows that are not aligned");
  check(choice<bf16>(256, 12, 197, 136).variant < 0, "wide heads");
  check(choice<float>(256, 12, 197, 64).variant < 0, "float");
  for (double scale : {0.0, -0.125, 1e-7, 1e7, double(INFINITY), double(NAN)})
    check(choice<bf16>(256, 12, 197, 64, scale).variant < 0, "a scale of " + std::to_string(scale));
  for (int64_t limit : {16, 99, 163, 227})  // KB
    for (int64_t tokens = 1; tokens < 700; tokens += 13)
      for (int64_t head_dim = 8; head_dim <= 128; head_dim += 8) {
        emulation::shared_limit() = limit * 1024;
        const ShortChoice chosen = choice<bf16>(3, 2, tokens, head_dim);
        check(chosen.error == nullptr && chosen.variant < form_of(head_dim).variants, "a variant that there is");
      }
  emulation::shared_limit() = 99 * 1024;
  ask_for("streaming");
  check(choice<bf16>(1, 1, 5, 64).variant < 0, "the streaming kernel, asked for");
  ask_for("t1-c32-w4-b4-swizzled-multiplied/3");
  const ShortChoice named = choice<bf16>(1, 1, 5, 64);
  check(named.variant >= 0 && named.splits == 3 && named.error == nullptr, "a variant by its name");
  for (const char* nonsense : {"nonsense", "99", "-1", "0x"}) {
    ask_for(nonsense);
    const char* error = choice<bf16>(1, 1, 5, 64).error;
    check(error != nullptr && std::strstr(error, "must be one of streaming, t1-c32") != nullptr, "an unknown variant");
  }
  ask_for("0");
  const char* error = choice<bf16>(1, 1, 1000, 64).error;
  check(error != nullptr && std::strstr(error, "shared memory") != nullptr, "a variant that does not fit");
  ask_for("");
  check(choice<bf16>(1, 1, 5, 64).error == nullptr, "an empty variable is none");
}

template <class T>
void test_type() {
  emulation::shared_limit() = emulation::kMostShared;
  test_values<T>();
  test_extremes<T>();
  test_not_a_number<T>();
}

}  // namespace
}  // namespace diffrate::cuda

int main() {
  using namespace diffrate::cuda;
  test_choice();
  test_type<__half>();
  test_type<__nv_bfloat16>();
  return diffrate::testing::report("short attention");
}
