// Sort, prune and merge: what stays is written without gaps.
#include "cpu/prune_merge.h"

#include "cpu/access.h"
#include "cpu/dispatch.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

template <class T>
struct DroppingPruneMerge : PruneMerge<T> {
  using Base = PruneMerge<T>;
  using W = typename Base::W;
  using Base::a;

  explicit DroppingPruneMerge(const PruneMergeArgs& args) : Base(args, args.k_m) {}

  void finish(int64_t image, char* memory, int64_t parts) const {
    typename Base::Scratch s(*this, parts, memory);
    if (Base::sources > 0) Base::merge(image, s, parts);
    int64_t* slot = a.slot + image * a.tokens;
    for (int64_t j = 0; j < a.tokens; ++j) slot[s.order[j]] = j < a.k_m ? j : -1;
    W* size = static_cast<W*>(a.out_size) + image * a.k_m;
    for (int64_t j = 0; j < a.k_m; ++j) size[j] = size_of<W>(a.size, image, s.order[j]);
    Base::for_merged(s, [&](int64_t source, int64_t to) {
      slot[s.order[a.k_m + source]] = to;
      size[to] += Base::size_of_source(image, s, source);
    });
  }
};

}  // namespace

void prune_merge(const PruneMergeArgs& a, const Threads& threads) {
  int64_t blocks = (a.k_m + kBlock - 1) / kBlock;
  dispatch(a.type,
           [&](auto example) { for_images(threads, a.images, blocks, DroppingPruneMerge<decltype(example)>(a)); });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
