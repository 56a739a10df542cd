// Which variant of short_attention.cuh serves what.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <span>
#include <string>

#include "cuda/attention.cuh"
#include "cuda/short_attention_variants.cuh"

namespace diffrate::cuda {
namespace {

constexpr const char* kEnvironment = "DIFFRATE_ATTENTION_VARIANT";
constexpr const char* kStreaming = "streaming";

struct Rule {
  int tokens;  // at most
  int variant;
};

// The variants for a head's channels padded to `depth`, and which one serves how many tokens. More than the last rule's
// are left to the streaming kernel: a multiprocessor would hold one block, and wait while it waits for its copies.
struct Form {
  int depth;
  std::span<const ShortVariant> variants;
  std::span<const Rule> rules;
  int few;  // the variant where there are fewer heads than multiprocessors
};

constexpr Rule kRules32[] = {{512, 0}};
constexpr Rule kRules64[] = {{80, 2}, {112, 0}, {144, 1}, {160, 2}, {176, 3}, {240, 4}, {368, 5}};
constexpr Rule kRules80[] = {{176, 2}, {208, 0}, {304, 1}};
constexpr Rule kRules128[] = {{112, 0}, {160, 1}};
constexpr Form kForms[] = {
    {32, kShortVariants<32>, kRules32, 0},
    {64, kShortVariants<64>, kRules64, 1},
    {80, kShortVariants<80>, kRules80, 0},
    {128, kShortVariants<128>, kRules128, 0},
};

std::string name_of(const ShortVariant& v) {
  char text[80];
  snprintf(text, sizeof text, "t%d-c%d-w%d-b%d-%s-%s", v.tiles, v.keys, v.warps, v.blocks,
           v.swizzled ? "swizzled" : "padded", v.tensor_sums ? "multiplied" : "added");
  return text;
}

// The warps of a block, and its shared memory.
struct Size {
  int warps;
  int64_t shared_bytes;

  Size(const Form& form, const ShortVariant& v, int tokens, int splits) {
    const int groups = (tiles_of(tokens) + v.tiles - 1) / v.tiles;
    const int rounds = (groups + v.warps * splits - 1) / (v.warps * splits);
    warps = (groups + rounds * splits - 1) / (rounds * splits);
    if (splits > 1) warps = std::clamp(4, warps, v.warps);  // those without rows help to copy
    const int stride = form.depth * 2 + (v.swizzled ? 0 : 16);
    shared_bytes = ShortShared(nullptr, stride, tiles_of(tokens) * 16, warps).bytes;
  }
};

// The text is this thread's until the next one.
const char* said(const std::string& message) {
  static thread_local std::string text;
  text = message;
  return text.c_str();
}

// What the environment asks for: NAME or INDEX, and perhaps /SPLITS, such as "t1-c32-w4-b4-swizzled-multiplied/4".
ShortChoice asked_for(const char* wanted, const Form& form, int tokens) {
  ShortChoice choice{.depth = form.depth};
  const char* slash = strchr(wanted, '/');
  const std::string name = slash == nullptr ? wanted : std::string(wanted, slash);
  if (slash != nullptr) choice.splits = std::max(1, atoi(slash + 1));
  std::string names = kStreaming;
  for (int i = 0; i < static_cast<int>(form.variants.size()); ++i) {
    if (name == name_of(form.variants[i]) || name == std::to_string(i)) choice.variant = i;
    names += ", " + name_of(form.variants[i]);
  }
  if (choice.variant < 0)
    choice.error = said(std::string(kEnvironment) + " is '" + wanted + "', and must be one of " + names);
  else if (Size(form, form.variants[choice.variant], tokens, choice.splits).shared_bytes > shared_limit())
    choice.error = said(std::string(kEnvironment) + " is '" + wanted + "': so much does not fit shared memory");
  return choice;
}

// Blocks among which to divide a head's rows: few heads are spread over all multiprocessors, so that all blocks run at
// the same time. Each loads all keys and values again: more than four gained nothing.
int splits_for(int64_t image_heads) {
  constexpr int64_t kBlocksAtOnce = 2, kMost = 4;
  return static_cast<int>(
      std::clamp<int64_t>(kBlocksAtOnce * multiprocessors() / std::max<int64_t>(image_heads, 1), 1, kMost));
}

ShortChoice best(const Form& form, int tokens, int64_t image_heads) {
  ShortChoice choice{.depth = form.depth, .splits = splits_for(image_heads)};
  auto rule = std::find_if(form.rules.begin(), form.rules.end(), [&](const Rule& r) { return tokens <= r.tokens; });
  if (rule == form.rules.end()) return choice;
  const int variant = choice.splits > 1 ? form.few : rule->variant;
  if (Size(form, form.variants[variant], tokens, choice.splits).shared_bytes <= shared_limit())
    choice.variant = variant;
  return choice;
}

bool takes(const Heads& from, int64_t head_dim) {
  return aligned_heads<__half>(from, head_dim) && std::abs(from.stride_token) <= INT32_MAX;  // as __nv_bfloat16
}

// Scales by which neither the scaled logits nor what a size adds to unscaled ones leave a float's range.
bool is_common(double scale) { return scale >= 1e-6 && scale <= 1e6; }

ShortHeads short_heads(const Heads& from) {
  return {from.data, from.stride_image, from.stride_head, static_cast<int>(from.stride_token)};
}

}  // namespace

ShortChoice choose_short_attention(const AttentionArgs& a) {
  constexpr int64_t kMostTokens = 4096;  // beyond any shared memory
  const bool half = a.type == Type::f16 || a.type == Type::bf16;
  if (!half || a.received || a.tokens > kMostTokens || !is_common(a.scale) || a.heads * a.head_dim > INT32_MAX ||
      !takes(a.q, a.head_dim) || !takes(a.k, a.head_dim) || !takes(a.v, a.head_dim))
    return {};
  auto form = std::find_if(std::begin(kForms), std::end(kForms), [&](const Form& f) { return a.head_dim <= f.depth; });
  if (form == std::end(kForms)) return {};
  const int tokens = static_cast<int>(a.tokens);
  const char* wanted = getenv(kEnvironment);
  if (wanted == nullptr || *wanted == '\0') return best(*form, tokens, a.images * a.heads);
  if (strcmp(wanted, kStreaming) == 0) return {};
  return asked_for(wanted, *form, tokens);
}

const char* short_attention(const AttentionArgs& a, const ShortChoice& choice, float* class_rows, Stream stream) {
  const Form& form =
      *std::find_if(std::begin(kForms), std::end(kForms), [&](const Form& f) { return f.depth == choice.depth; });
  const int tokens = static_cast<int>(a.tokens);
  const Size size(form, form.variants[choice.variant], tokens, choice.splits);
  const ShortLaunch launch{.args = {.q = short_heads(a.q),
                                    .k = short_heads(a.k),
                                    .v = short_heads(a.v),
                                    .size = a.size,
                                    .out = a.out,
                                    .class_rows = class_rows,
                                    .heads = static_cast<int>(a.heads),
                                    .tokens = tokens,
                                    .head_dim = static_cast<int>(a.head_dim),
                                    .splits = choice.splits,
                                    .scale = static_cast<float>(a.scale * kLog2OfE),
                                    .inverse_scale = static_cast<float>(1 / (a.scale * kLog2OfE))},
                           .blocks = a.images * a.heads * choice.splits,
                           .shared_bytes = size.shared_bytes,
                           .warps = size.warps,
                           .stream = stream};
  return (a.type == Type::f16 ? launch_short_attention_f16 : launch_short_attention_bf16)(choice.depth, choice.variant,
                                                                                          launch);
}

}  // namespace diffrate::cuda
