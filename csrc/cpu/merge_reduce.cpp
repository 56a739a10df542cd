// Mean of the tokens that share a destination, and its gradient.
#include "cpu/access.h"
#include "cpu/dispatch.h"
#include "cpu/images.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

// A destination outside [0, kept) receives nothing and gives nothing, whatever it is.
inline int64_t destination(const MergeReduceArgs& a, int64_t image, int64_t token) {
  int64_t to = a.dst[image * a.dst_stride_image + token * a.dst_stride_token];
  return to >= 0 && to < a.kept ? to : -1;
}

template <class T>
struct Forward {
  using W = Wide<T>;
  const MergeReduceArgs& a;

  struct Scratch {
    int32_t* head;  // of each destination's list of tokens, -1 where it has none
    int32_t* next;
    Scratch(const MergeReduceArgs& a, char* memory) {
      Arena arena(memory);
      head = arena.take<int32_t>(a.kept);
      next = arena.take<int32_t>(a.tokens);
    }
  };

  int64_t scratch_bytes(int64_t) const { return Arena::bytes<int32_t>(a.kept) + Arena::bytes<int32_t>(a.tokens); }

  void prepare(int64_t image, char* memory) const {
    Scratch s(a, memory);
    fill(s.head, a.kept, int32_t{-1});
    for (int64_t i = a.tokens - 1; i >= 0; --i) {  // last to first: lists in ascending order
      int64_t to = destination(a, image, i);
      if (to < 0) continue;
      s.next[i] = s.head[to];
      s.head[to] = static_cast<int32_t>(i);
    }
  }

  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    Scratch s(a, memory);
    for (int64_t to = a.kept * p / parts; to < a.kept * (p + 1) / parts; ++to) {
      T* out = static_cast<T*>(a.out) + (image * a.kept + to) * a.channels;
      W total = 0;
      for (int32_t i = s.head[to]; i >= 0; i = s.next[i]) total += size_of<W>(a.weights, image, i);
      if (total == 0)
        std::memset(out, 0, a.channels * sizeof(T));
      else if (s.next[s.head[to]] < 0 && total - total == 0)  // its mean is itself, unless its weight is not finite
        copy_token(image, s.head[to], out);
      else
        merge_tokens(image, s, s.head[to], total, out);
    }
  }

  const T* residual_of(int64_t image, int64_t token) const {
    return a.residual.data ? row_of<T>(a.residual, image, token) : nullptr;
  }

  void copy_token(int64_t image, int64_t token, T* out) const {
    const T *x = row_of<T>(a.x, image, token), *residual = residual_of(image, token);
    if (residual == nullptr) {
      std::memcpy(out, x, a.channels * sizeof(T));
      return;
    }
    for_vectors<W>(a.channels, [&](int64_t c, auto load_at, auto store_at) {
      store_at(out + c, load_at(x + c) + load_at(residual + c));
    });
  }

  void merge_tokens(int64_t image, const Scratch& s, int32_t first, W total, T* out) const {
    for_vectors<W>(a.channels, [&](int64_t c, auto load_at, auto store_at) {
      Vec<W> mean = {};
      for (int32_t i = first; i >= 0; i = s.next[i]) {
        Vec<W> value = load_at(row_of<T>(a.x, image, i) + c);
        const T* residual = residual_of(image, i);
        if (residual != nullptr) value = rounded<T>(value + load_at(residual + c));
        mean += value * size_of<W>(a.weights, image, i);
      }
      store_at(out + c, mean / total);
    });
  }

  void finish(int64_t, char*, int64_t) const {}
};

template <class T>
struct Backward {
  using W = Wide<T>;
  const MergeReduceArgs& a;

  int64_t scratch_bytes(int64_t) const { return Arena::bytes<W>(a.kept); }

  void prepare(int64_t image, char* memory) const {
    W* total = Arena(memory).take<W>(a.kept);
    fill(total, a.kept, W(0));
    for (int64_t i = 0; i < a.tokens; ++i)
      if (int64_t to = destination(a, image, i); to >= 0) total[to] += size_of<W>(a.weights, image, i);
  }

  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    const W* total = Arena(memory).take<W>(a.kept);
    for (int64_t i = a.tokens * p / parts; i < a.tokens * (p + 1) / parts; ++i) {
      T* out = static_cast<T*>(a.out) + (image * a.tokens + i) * a.channels;
      int64_t to = destination(a, image, i);
      if (to < 0 || total[to] == 0) {
        std::memset(out, 0, a.channels * sizeof(T));
        continue;
      }
      W share = size_of<W>(a.weights, image, i) / total[to];
      const T* from = row_of<T>(a.x, image, to);
      for_vectors<W>(a.channels,
                     [&](int64_t c, auto load_at, auto store_at) { store_at(out + c, load_at(from + c) * share); });
    }
  }

  void finish(int64_t, char*, int64_t) const {}
};

}  // namespace

void merge_reduce(const MergeReduceArgs& a, const Threads& threads) {
  dispatch(a.type, [&](auto example) { for_images(threads, a.images, a.kept, Forward<decltype(example)>{a}); });
}

void merge_reduce_backward(const MergeReduceArgs& a, const Threads& threads) {
  dispatch(a.type, [&](auto example) { for_images(threads, a.images, a.tokens, Backward<decltype(example)>{a}); });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
