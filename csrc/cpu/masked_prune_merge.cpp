// Sort, prune and merge in the search step: all tokens stay, in sorted order, and a mask says which are alive.
#include "common/kept_numbers.h"
#include "cpu/access.h"
#include "cpu/dispatch.h"
#include "cpu/prune_merge.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

template <class W>
KeptPositions read_positions(const MaskedPruneMergeArgs& a) {
  double alive = 0;
  for (int64_t j = 0; j < a.tokens; ++j) alive += size_of<W>(a.mask, 0, j);
  return kept_positions(static_cast<W>(alive), *static_cast<const W*>(a.kept_p), *static_cast<const W*>(a.kept_m),
                        a.tokens, a.prefix);
}

template <class T>
struct MaskedPruneMerge : PruneMerge<T> {
  using Base = PruneMerge<T>;
  using W = typename Base::W;
  const MaskedPruneMergeArgs& masked;
  int64_t last;  // of the positions that were alive before, the one after the last

  MaskedPruneMerge(const PruneMergeArgs& alive, const MaskedPruneMergeArgs& args, int64_t last)
      : Base(alive, args.tokens), masked(args), last(last) {}

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
      mask[j] = j >= kept && j < last ? W(0) : size_of<W>(masked.mask, image, s.order[j]);
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
  if (a.images == 0) return;  // there is no mask to read
  int64_t blocks = (a.tokens + kBlock - 1) / kBlock;
  dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    KeptPositions at = read_positions<Wide<T>>(a);
    PruneMergeArgs alive = alive_part(a);
    alive.k_p = at.middle;
    alive.k_m = at.kept;
    for_images(threads, a.images, blocks, MaskedPruneMerge<T>(alive, a, at.last));
  });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
