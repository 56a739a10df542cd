// Sort, prune and merge in the search step: all tokens stay, in sorted order, and a mask says which are alive.
#include "cpu/prune_merge.h"
#include "cpu/tables.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

// The tokens that stay alive are written as if the others were dropped; what is masked follows after them.
PruneMergeArgs alive_part(const MaskedPruneMergeArgs& a) {
  int64_t middle = a.k_p < a.last ? a.k_p : a.last;
  return {a.type,  a.images,        a.tokens,     a.channels, a.prefix, middle,         a.k_m < middle ? a.k_m : middle,
          a.x,     {nullptr, 0, 0}, a.importance, a.size,     false,    a.cosine_sizes, a.out,
          nullptr, nullptr};
}

template <class T>
struct MaskedPruneMerge : PruneMerge<T> {
  using Base = PruneMerge<T>;
  using W = typename Base::W;
  const MaskedPruneMergeArgs& masked;

  MaskedPruneMerge(const PruneMergeArgs& alive, const MaskedPruneMergeArgs& args)
      : Base(alive, args.tokens), masked(args) {}

  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    Base::part(image, memory, p, parts);
    typename Base::Scratch s(*this, parts, memory);
    int64_t first = Base::a.k_m, count = masked.tokens - first;
    for (int64_t j = first + count * p / parts; j < first + count * (p + 1) / parts; ++j)
      Base::copy_token(image, s.order[j], Base::out_row(image, j));
  }

  void finish(int64_t image, char* memory, int64_t parts) const {
    typename Base::Scratch s(*this, parts, memory);
    int64_t tokens = masked.tokens, kept = Base::a.k_m;
    if (Base::sources > 0) Base::merge(image, s, parts);
    int64_t *order = masked.order + image * tokens, *dst = masked.dst + image * tokens;
    W* mask = static_cast<W*>(masked.out_mask) + image * tokens;
    W* size = static_cast<W*>(masked.out_size) + image * tokens;
    for (int64_t j = 0; j < tokens; ++j) {
      order[j] = s.order[j];
      dst[j] = j;
      mask[j] = j >= kept && j < masked.last ? W(0) : size_of<W>(masked.mask, image, s.order[j]);
      size[j] = size_of<W>(Base::a.size, image, s.order[j]);
    }
    if (Base::sources == 0) return;
    auto at_least_one = [](W value) { return value < 1 ? W(1) : value; };
    for (int64_t j = 0; j < kept; ++j) size[j] = at_least_one(size[j]);
    Base::for_merged(s, [&](int64_t source, int64_t to) {
      W gained = at_least_one(Base::size_of_source(image, s, source));
      dst[kept + source] = to;
      size[kept + source] = gained;
      size[to] += gained;
    });
  }
};

}  // namespace

void masked_prune_merge(const MaskedPruneMergeArgs& a, const Threads& threads) {
  PruneMergeArgs alive = alive_part(a);
  int64_t blocks = (a.tokens + kBlock - 1) / kBlock;
  dispatch(a.type,
           [&](auto example) { for_images(threads, a.images, blocks, MaskedPruneMerge<decltype(example)>(alive, a)); });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
