// Sort, prune and merge in the search step: all tokens stay, in sorted order, and a mask says which are alive.
#include "common/kept_numbers.h"
#include "cpu/access.h"
#include "cpu/dispatch.h"
#include "cpu/prune_merge.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

template <class W, class Args>
KeptPositions read_positions(const Args& a) {
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

// A destination's gradient is shared by all that merged into it; a source stays in its place besides.
template <class T>
struct FeatureGradients {
  using W = Wide<T>;
  const MaskedPruneMergeBackwardArgs& a;

  int64_t scratch_bytes(int64_t) const { return Arena::bytes<int32_t>(a.tokens); }

  void prepare(int64_t image, char* memory) const {
    int32_t* members = Arena(memory).take<int32_t>(a.tokens);
    fill(members, a.tokens, 0);
    for (int64_t j = 0; j < a.tokens; ++j) ++members[token_at(a.dst, a, image, j)];
  }

  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    const int32_t* members = Arena(memory).take<int32_t>(a.tokens);
    for (int64_t j = a.tokens * p / parts; j < a.tokens * (p + 1) / parts; ++j) {
      int64_t to = token_at(a.dst, a, image, j);
      T* out = static_cast<T*>(a.grad_x) + (image * a.tokens + token_at(a.order, a, image, j)) * a.channels;
      const T *own = row_of<T>(a.grad_out, image, j), *mean = row_of<T>(a.grad_out, image, to);
      Vec<W> share = Vec<W>{} + W(1) / static_cast<W>(members[to]);
      for_vectors<W>(a.channels, [&](int64_t c, auto load_at, auto store_at) {
        Vec<W> stays = to == j ? Vec<W>{} : load_at(own + c);
        store_at(out + c, multiply_add(load_at(mean + c), share, stays));
      });
    }
  }

  void finish(int64_t, char*, int64_t) const {}
};

// Of the mask, and of the probabilities, which every image's mask was multiplied by. A few numbers beside the features:
// not worth a second thread.
template <class W>
void mask_gradients(const MaskedPruneMergeBackwardArgs& a) {
  KeptPositions at = a.images > 0 ? read_positions<W>(a) : KeptPositions{};
  Memory memory(Arena::bytes<double>(a.tokens));
  double* sum = Arena(memory.get()).take<double>(a.tokens);
  fill(sum, a.tokens, 0.0);
  for (int64_t image = 0; image < a.images; ++image)
    for (int64_t j = 0; j < a.tokens; ++j) {
      int64_t from = token_at(a.order, a, image, j);
      W gradient = size_of<W>(a.grad_out_mask, image, j);
      sum[j] += static_cast<double>(gradient) * static_cast<double>(size_of<W>(a.mask, image, from));
      static_cast<W*>(a.grad_mask)[image * a.tokens + from] = merges(at, j) || prunes(at, j) ? W(0) : gradient;
    }
  for (int64_t j = 0; j < a.tokens; ++j) {
    W total = static_cast<W>(sum[j]);
    static_cast<W*>(a.grad_prune_prob)[j] = at.middle < at.last && !merges(at, j) ? total : W(0);
    static_cast<W*>(a.grad_merge_prob)[j] = at.kept < at.middle && !prunes(at, j) ? total : W(0);
  }
}

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

void masked_prune_merge_backward(const MaskedPruneMergeBackwardArgs& a, const Threads& threads) {
  dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    if (a.grad_x) for_images(threads, a.images, a.tokens, FeatureGradients<T>{a});
    if (a.grad_prune_prob) mask_gradients<Wide<T>>(a);
  });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
