// Sort and gather in one pass over the tokens.
#include "cpu/access.h"
#include "cpu/dispatch.h"
#include "cpu/images.h"
#include "cpu/memory.h"
#include "cpu/sort.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

template <class T>
struct SortTokens {
  using W = Wide<T>;
  const SortArgs& a;

  struct Scratch {
    W* sums;
    SortItem<W>* items;  // twice as many: see sort_items
    int32_t* order;
    Scratch(const SortArgs& a, char* memory) {
      Arena arena(memory);
      sums = arena.take<W>(a.tokens);
      items = arena.take<SortItem<W>>(2 * a.tokens);
      order = arena.take<int32_t>(a.tokens);
    }
  };

  int64_t scratch_bytes(int64_t) const {
    return Arena::bytes<W>(a.tokens) + Arena::bytes<SortItem<W>>(2 * a.tokens) + Arena::bytes<int32_t>(a.tokens);
  }

  void prepare(int64_t image, char* memory) const {
    Scratch s(a, memory);
    sort_image<W>(a.importance, image, a.tokens, a.prefix, s.sums, s.items, s.order);
    for (int64_t j = 0; j < a.tokens; ++j) {
      a.order[image * a.tokens + j] = s.order[j];
      static_cast<W*>(a.out_size)[image * a.tokens + j] = size_of<W>(a.size, image, s.order[j]);
    }
  }

  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    Scratch s(a, memory);
    T* out = static_cast<T*>(a.out) + image * a.tokens * a.channels;
    for (int64_t j = a.tokens * p / parts; j < a.tokens * (p + 1) / parts; ++j)
      std::memcpy(out + j * a.channels, row_of<T>(a.x, image, s.order[j]), a.channels * sizeof(T));
  }

  void finish(int64_t, char*, int64_t) const {}
};

}  // namespace

void sort_tokens(const SortArgs& a, const Threads& threads) {
  dispatch(a.type, [&](auto example) { for_images(threads, a.images, a.tokens, SortTokens<decltype(example)>{a}); });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
