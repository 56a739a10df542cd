// The class token's row of the attention map, without the map.
#include "cpu/access.h"
#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

template <class T>
struct ClassAttention {
  using W = Wide<T>;
  const AttentionArgs& a;

  struct Scratch {
    W* bias;
    W* rows;    // (heads, padded): the class row of each head
    W* logits;  // (parts, padded)
    W* query;   // (parts, head_dim, padded to whole vectors)
    int64_t bytes;
    Scratch(const AttentionArgs& a, int64_t parts, char* memory) {
      Arena arena(memory);
      bias = arena.take<W>(padded<W>(a.tokens));
      rows = arena.take<W>(a.heads * padded<W>(a.tokens));
      logits = arena.take<W>(parts * padded<W>(a.tokens));
      query = arena.take<W>(parts * padded<W>(a.head_dim));
      bytes = arena.take<char>(0) - memory;
    }
  };

  int64_t scratch_bytes(int64_t parts) const { return Scratch(a, parts, nullptr).bytes; }

  void prepare(int64_t image, char* memory) const { log_sizes<W>(a.size, a.tokens, image, Scratch(a, 1, memory).bias); }

  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    Scratch s(a, parts, memory);
    int64_t length = padded<W>(a.tokens);
    W* logits = s.logits + p * length;
    W* query = s.query + p * padded<W>(a.head_dim);
    for (int64_t head = a.heads * p / parts; head < a.heads * (p + 1) / parts; ++head) {
      const T* q = row_of<T>(a.q, image, head, 0);
      const T* k = row_of<T>(a.k, image, head, 0);
      for_vectors<W>(a.head_dim, [&](int64_t d, auto load_at, auto) {
        store(query + d, load_at(q + d) * static_cast<W>(a.scale));
      });
      for (int64_t j = 0; j < a.tokens; ++j) {
        Vec<W> dot = {};
        for_vectors<W>(a.head_dim, [&](int64_t d, auto load_at, auto) {
          dot += load(query + d) * load_at(k + j * a.k.stride_token + d);
        });
        logits[j] = sum(dot) + s.bias[j];
      }
      for (int64_t j = a.tokens; j < length; ++j) logits[j] = s.bias[j];
      W scale = exponentials(logits, length);
      for (int64_t j = 0; j < length; j += kLanes<W>) store(s.rows + head * length + j, load(logits + j) * scale);
    }
  }

  void finish(int64_t image, char* memory, int64_t) const {
    W* importance = static_cast<W*>(a.importance) + image * (a.tokens - a.prefix);
    mean_of_heads<W>(Scratch(a, 1, memory).rows, a.heads, W(1), a.prefix, a.tokens, importance);
  }
};

}  // namespace

void class_attention(const AttentionArgs& a, const Threads& threads) {
  dispatch(a.type, [&](auto example) { for_images(threads, a.images, a.heads, ClassAttention<decltype(example)>{a}); });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
