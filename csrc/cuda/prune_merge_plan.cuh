// Which kernel runs prune_merge, on how many blocks for an image.
//
// DIFFRATE_PRUNE_MERGE_PLAN names another plan than the one chosen here, to measure it without building again
// (benchmarks/tune_prune_merge.py). Where that plan cannot run the choice stays; with an exclamation mark behind the
// name that is an error.
#pragma once

#include <cstdlib>
#include <string>
#include <string_view>

#include "cuda/prune_merge_image.cuh"

namespace diffrate::cuda {

struct Plan {
  enum class Kernel { rows, channels };
  Kernel kernel;
  int parts;        // blocks that share an image
  Reading reading;  // of `rows`, where rows are aligned
};

// In this order: the first that can run and fits. `twelfths` says how full a plan may make the device: blocks are at
// most so many twelfths of the multiprocessors. Measured on an H200 (132 multiprocessors) with 197 tokens of 768
// channels in bfloat16 at 1 to 256 images. Larger clusters stop earlier, as the multiprocessors that can form clusters
// of 4 or 8 at the same time are fewer than there are: of four parts, 24 images took 20 % less time than of two, 32
// images a third more.
struct Choice {
  const char* name;
  Plan plan;
  int twelfths;
};
constexpr int kAnyNumber = -1, kOnlyByName = 0;
inline constexpr Choice kChoices[] = {
    {"channels-8", {Plan::Kernel::channels, 8, {}}, 8},
    {"channels-4", {Plan::Kernel::channels, 4, {}}, 9},
    {"channels-2", {Plan::Kernel::channels, 2, {}}, 8},
    {"rows-8", {Plan::Kernel::rows, 8, Reading::few_images}, 8},
    {"rows-4", {Plan::Kernel::rows, 4, Reading::few_images}, 8},
    {"rows-2", {Plan::Kernel::rows, 2, Reading::few_images}, 12},
    {"rows-2-paired", {Plan::Kernel::rows, 2, Reading::many_images}, 24},
    {"rows-1-paired", {Plan::Kernel::rows, 1, Reading::many_images}, kAnyNumber},
    {"rows-1", {Plan::Kernel::rows, 1, Reading::few_images}, kOnlyByName},
    {"rows-4-paired", {Plan::Kernel::rows, 4, Reading::many_images}, kOnlyByName},
};

inline bool fits(const Choice& choice, int64_t images, int64_t multiprocessors) {
  if (choice.twelfths == kOnlyByName) return false;
  return choice.twelfths == kAnyNumber || images * choice.plan.parts * 12 <= multiprocessors * choice.twelfths;
}

inline const char* unknown_plan() {
  static const std::string text = [] {
    std::string names = "DIFFRATE_PRUNE_MERGE_PLAN must be one of ";
    for (const Choice& choice : kChoices) names += (&choice == kChoices ? "" : ", ") + std::string(choice.name);
    return names;
  }();
  return text.c_str();
}

// Returns nullptr, or what is wrong. possible(plan): whether this call can run so.
template <class Possible>
const char* choose_plan(int64_t images, Possible possible, Plan& plan) {
  const char* variable = std::getenv("DIFFRATE_PRUNE_MERGE_PLAN");
  std::string_view wanted = variable == nullptr ? "" : variable;
  bool strict = wanted.ends_with('!');
  if (strict) wanted.remove_suffix(1);
  bool known = variable == nullptr || variable[0] == 0;
  for (const Choice& choice : kChoices) {
    if (wanted != choice.name) continue;
    known = true;
    plan = choice.plan;
    if (possible(plan)) return nullptr;
    if (strict) return "the plan of DIFFRATE_PRUNE_MERGE_PLAN cannot run this call";
  }
  if (!known) return unknown_plan();
  const int64_t most = multiprocessors();
  for (const Choice& choice : kChoices) {
    plan = choice.plan;
    if (fits(choice, images, most) && possible(plan)) return nullptr;
  }
  return "no plan can run this call";  // the last always can
}

}  // namespace diffrate::cuda
