// Importance, and the sort order that follows from it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

template <class W>
struct SortItem {
  std::conditional_t<sizeof(W) == 8, uint64_t, uint32_t> key;
  int32_t patch;
};

// Sorts by key, stably, a byte at a time from the lowest: some 200 items with few digits, where comparing is slower.
// `items` is `2 * count` long: the second half is working space.
template <class W>
void sort_items(SortItem<W>* items, int64_t count) {
  SortItem<W>*from = items, *to = items + count;
  for (unsigned shift = 0; shift < 8 * sizeof(items->key); shift += 8) {
    auto digit = [shift](const SortItem<W>& item) { return (item.key >> shift) & 0xff; };
    int32_t start[256] = {};
    for (int64_t i = 0; i < count; ++i) ++start[digit(from[i])];
    int32_t next = 0;
    for (int32_t& place : start) {
      int32_t here = place;
      place = next;
      next += here;
    }
    for (int64_t i = 0; i < count; ++i) to[start[digit(from[i])]++] = from[i];
    SortItem<W>* swapped = from;
    from = to;
    to = swapped;
  }
  static_assert(sizeof(items->key) % 2 == 0, "after an even number of passes the result is back in `items`");
}

template <class A, class W>
void add_importance(const Importance& from, int64_t image, int64_t patches, W* sums) {
  for (int64_t head = 0; head < from.heads; ++head) {
    for (int64_t query = 0; query < from.queries; ++query) {
      const A* row = static_cast<const A*>(from.data) + image * from.stride_image + head * from.stride_head +
                     query * from.stride_query;
      for (int64_t j = 0; j < patches; ++j) sums[j] += to_wide(row[j * from.stride_token]);
    }
  }
}

// Writes the input position of each sorted position: the prefix, then patches by descending importance.
template <class W>
void sort_image(const Importance& from, int64_t image, int64_t tokens, int64_t prefix, W* sums, SortItem<W>* items,
                int32_t* order) {
  int64_t patches = tokens - prefix;
  fill(sums, patches, W(0));
  switch (from.type) {
    case Type::f32: add_importance<float>(from, image, patches, sums); break;
    case Type::f64: add_importance<double>(from, image, patches, sums); break;
    case Type::f16: add_importance<Half>(from, image, patches, sums); break;
    case Type::bf16: add_importance<BFloat16>(from, image, patches, sums); break;
  }
  W count = static_cast<W>(from.heads * from.queries);
  for (int64_t j = 0; j < patches; ++j) items[j] = {descending_key(sums[j] / count), static_cast<int32_t>(j)};
  sort_items<W>(items, patches);
  for (int64_t j = 0; j < prefix; ++j) order[j] = static_cast<int32_t>(j);
  for (int64_t j = 0; j < patches; ++j) order[prefix + j] = items[j].patch + static_cast<int32_t>(prefix);
}

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
