// The column means of the attention map, without the map: a few of its rows at a time.
#include "cpu/access.h"
#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

constexpr int64_t kQueries = 4;  // rows of the map that are computed together

template <class T>
struct ReceivedAttention {
  using W = Wide<T>;
  const AttentionArgs& a;

  struct Scratch {
    W* bias;
    W* rows;    // (heads, padded): the column sums of each head
    W* keys;    // (parts, head_dim, padded): transposed, so that a vector holds one channel of many keys
    W* logits;  // (parts, kQueries, padded)
    W* query;   // (parts, kQueries, head_dim)
    W* lost;    // (parts, padded): what rounding took from the column sums
    int64_t bytes;
    Scratch(const AttentionArgs& a, int64_t parts, char* memory) {
      int64_t length = padded<W>(a.tokens);
      Arena arena(memory);
      bias = arena.take<W>(length);
      rows = arena.take<W>(a.heads * length);
      keys = arena.take<W>(parts * a.head_dim * length);
      logits = arena.take<W>(parts * kQueries * length);
      query = arena.take<W>(parts * kQueries * a.head_dim);
      lost = arena.take<W>(parts * length);
      bytes = arena.take<char>(0) - memory;
    }
  };

  int64_t scratch_bytes(int64_t parts) const { return Scratch(a, parts, nullptr).bytes; }

  void prepare(int64_t image, char* memory) const { log_sizes<W>(a.size, a.tokens, image, Scratch(a, 1, memory).bias); }

  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    Scratch s(a, parts, memory);
    int64_t length = padded<W>(a.tokens);
    W* keys = s.keys + p * a.head_dim * length;
    W* logits = s.logits + p * kQueries * length;
    W* query = s.query + p * kQueries * a.head_dim;
    W* lost = s.lost + p * length;
    for (int64_t head = a.heads * p / parts; head < a.heads * (p + 1) / parts; ++head) {
      const T* q = row_of<T>(a.q, image, head, 0);
      const T* k = row_of<T>(a.k, image, head, 0);
      W* sums = s.rows + head * length;
      fill(sums, length, W(0));
      fill(lost, length, W(0));
      fill(keys, a.head_dim * length, W(0));
      for (int64_t j = 0; j < a.tokens; ++j)
        for (int64_t d = 0; d < a.head_dim; ++d) keys[d * length + j] = to_wide(k[j * a.k.stride_token + d]);
      for (int64_t i = 0; i < a.tokens; i += kQueries) {
        int64_t queries = std::min(kQueries, a.tokens - i);
        for (int64_t r = 0; r < kQueries; ++r)
          for (int64_t d = 0; d < a.head_dim; ++d)  // past the last query its row is computed again and not used
            query[r * a.head_dim + d] =
                to_wide(q[(i + std::min(r, queries - 1)) * a.q.stride_token + d]) * static_cast<W>(a.scale);
        for (int64_t j = 0; j < length; j += kLanes<W>) {
          Vec<W> dot[kQueries] = {}, odd[kQueries] = {};  // two sums each: shorter ones round less
          for (int64_t d = 0; d + 1 < a.head_dim; d += 2) {
            Vec<W> key = load(keys + d * length + j), next = load(keys + (d + 1) * length + j);
            for (int64_t r = 0; r < kQueries; ++r) {
              dot[r] += key * query[r * a.head_dim + d];
              odd[r] += next * query[r * a.head_dim + d + 1];
            }
          }
          if (a.head_dim % 2 == 1) {
            Vec<W> key = load(keys + (a.head_dim - 1) * length + j);
            for (int64_t r = 0; r < kQueries; ++r) dot[r] += key * query[(r + 1) * a.head_dim - 1];
          }
          for (int64_t r = 0; r < kQueries; ++r) store(logits + r * length + j, dot[r] + odd[r] + load(s.bias + j));
        }
        W share[kQueries] = {};
        for (int64_t r = 0; r < queries; ++r) share[r] = exponentials(logits + r * length, length);
        for (int64_t j = 0; j < length; j += kLanes<W>) {
          Vec<W> received = {};
          for (int64_t r = 0; r < queries; ++r) received += load(logits + r * length + j) * share[r];
          // compensated summation: what rounding took from the sum is given back with the next rows
          received -= load(lost + j);
          Vec<W> before = load(sums + j), after = before + received;
          store(lost + j, (after - before) - received);
          store(sums + j, after);
        }
      }
    }
  }

  void finish(int64_t image, char* memory, int64_t) const {
    W* importance = static_cast<W*>(a.importance) + image * (a.tokens - a.prefix);
    mean_of_heads<W>(Scratch(a, 1, memory).rows, a.heads, static_cast<W>(a.tokens), a.prefix, a.tokens, importance);
  }
};

}  // namespace

void received_attention(const AttentionArgs& a, const Threads& threads) {
  dispatch(a.type,
           [&](auto example) { for_images(threads, a.images, a.heads, ReceivedAttention<decltype(example)>{a}); });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
