// Attention of the search step and its gradients, a block of queries at a time: no N x N map exists, and the backward
// pass keeps nothing but its inputs.
#include "cpu/access.h"
#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/images.h"
#include "cpu/memory.h"
#include "cpu/multiply.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

constexpr int64_t kQueries = 96;  // in a block: their logits fit the second-level cache

template <class T>
struct MaskedAttention {
  using W = Wide<T>;
  const AttentionArgs& a;
  bool backward;
  int64_t length;    // of a row over tokens, padded to whole vectors
  int64_t channels;  // of a row over a head's channels, padded

  MaskedAttention(const AttentionArgs& args, bool backward)
      : a(args), backward(backward), length(padded<W>(args.tokens)), channels(padded<W>(args.head_dim)) {}

  // Of one part, which handles one head at a time.
  struct Part {
    W *keys_t, *values_t;          // (D, length): transposed
    W *keys, *values;              // (N, channels)
    W *grad_k, *grad_v;            // (N, channels)
    W *query, *grad_out, *result;  // (kQueries, channels)
    W *weights, *grad_weights;     // (kQueries, length)
  };

  struct Scratch {
    W* bias;  // (length): log size
    W* mask;  // (length): 0 in the padding
    W* rows;  // (heads, length): importance, or the gradient of the mask
    Part part;
    int64_t bytes;
    Scratch(const MaskedAttention& op, int64_t p, int64_t parts, char* memory) {
      Arena arena(memory);
      bias = arena.take<W>(op.length);
      mask = arena.take<W>(op.length);
      rows = arena.take<W>(op.a.heads * op.length);
      auto take = [&](int64_t count) { return arena.take<W>(count * parts) + count * p; };
      int64_t by_token = op.a.tokens * op.channels, by_channel = op.a.head_dim * op.length;
      int64_t in_block = kQueries * op.channels, map = kQueries * op.length;
      part.keys_t = take(by_channel);
      part.query = take(in_block);
      part.result = take(in_block);
      part.weights = take(map);
      if (op.backward) {
        part.values_t = take(by_channel);
        part.keys = take(by_token);
        part.grad_k = take(by_token);
        part.grad_v = take(by_token);
        part.grad_out = take(in_block);
        part.grad_weights = take(map);
      } else {
        part.values = take(by_token);
      }
      bytes = arena.take<char>(0) - memory;
    }
  };

  int64_t scratch_bytes(int64_t parts) const { return Scratch(*this, 0, parts, nullptr).bytes; }

  void prepare(int64_t image, char* memory) const {
    Scratch s(*this, 0, 1, memory);
    log_sizes<W>(a.size, a.tokens, image, s.bias);
    for (int64_t j = 0; j < a.tokens; ++j) s.mask[j] = size_of<W>(a.mask, image, j);
    fill(s.mask + a.tokens, length - a.tokens, W(0));
    fill(s.rows, a.heads * length, W(0));
  }

  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    Scratch s(*this, p, parts, memory);
    for (int64_t head = a.heads * p / parts; head < a.heads * (p + 1) / parts; ++head) {
      if (backward)
        backward_head(image, head, s);
      else
        forward_head(image, head, s);
    }
  }

  void finish(int64_t image, char* memory, int64_t) const {
    Scratch s(*this, 0, 1, memory);
    if (backward) {
      W* grad = static_cast<W*>(a.grad_mask) + image * a.tokens;
      fill(grad, a.tokens, W(0));
      for (int64_t head = 0; head < a.heads; ++head)
        for (int64_t j = 0; j < a.tokens; ++j) grad[j] += s.rows[head * length + j];
      return;
    }
    W queries = 1;
    if (a.received) {
      queries = 0;
      for (int64_t j = 0; j < a.tokens; ++j) queries += s.mask[j];
      queries = queries > W(kTinySize) ? queries : W(kTinySize);
    }
    W* importance = static_cast<W*>(a.importance) + image * (a.tokens - a.prefix);
    mean_of_heads<W>(s.rows, a.heads, queries, a.prefix, a.tokens, importance);
  }

  void forward_head(int64_t image, int64_t head, const Scratch& s) const {
    const Part& t = s.part;
    transpose(a.k, image, head, t.query, t.keys_t);
    pack(a.v, image, head, 0, a.tokens, W(1), t.values);
    W* row_sums = s.rows + head * length;
    for (int64_t i = 0; i < a.tokens; i += kQueries) {
      int64_t queries = std::min(kQueries, a.tokens - i);
      logits_of_block(image, head, i, queries, s);
      for (int64_t r = 0; r < queries; ++r) {
        W* e = t.weights + r * length;
        W top = add_bias(e, s.bias), own = exponential(e[i + r] - top);
        Vec<W> total = {};
        for (int64_t j = 0; j < length; j += kLanes<W>) {
          Vec<W> seen = exp_nonpositive(load(e + j) - top) * load(s.mask + j);
          total += seen;
          store(e + j, seen);
        }
        W seen_sum = sum(total) + own * (1 - s.mask[i + r]);  // a token always sees itself
        e[i + r] = own;
        W inverse = 1 / (seen_sum + W(kMaskedEpsilon));
        W floor = W(kMaskedEpsilon) / static_cast<W>(a.tokens) * inverse;
        for (int64_t j = 0; j < length; j += kLanes<W>) store(e + j, load(e + j) * inverse + floor);
        if (a.received || i + r == 0) {
          W counts = a.received ? s.mask[i + r] : 1;
          for (int64_t j = 0; j < length; j += kLanes<W>)
            store(row_sums + j, load(row_sums + j) + load(e + j) * counts);
        }
      }
      multiply<W>({t.weights, length, 1}, t.values, channels, a.tokens, t.result, channels, queries, channels);
      for (int64_t r = 0; r < queries; ++r) unpack(t.result + r * channels, W(1), row_out(a.out, image, head, i + r));
    }
  }

  void backward_head(int64_t image, int64_t head, const Scratch& s) const {
    const Part& t = s.part;
    transpose(a.k, image, head, t.query, t.keys_t);
    transpose(a.v, image, head, t.query, t.values_t);
    pack(a.k, image, head, 0, a.tokens, W(1), t.keys);
    fill(t.grad_k, a.tokens * channels, W(0));
    fill(t.grad_v, a.tokens * channels, W(0));
    W* grad_mask = s.rows + head * length;
    W scale = static_cast<W>(a.scale);
    for (int64_t i = 0; i < a.tokens; i += kQueries) {
      int64_t queries = std::min(kQueries, a.tokens - i);
      logits_of_block(image, head, i, queries, s);
      pack(a.grad, image, head, i, queries, W(1), t.grad_out);
      multiply<W>({t.grad_out, channels, 1}, t.values_t, length, a.head_dim, t.grad_weights, length, queries, length);
      for (int64_t r = 0; r < queries; ++r)
        gradients_of_row(t.weights + r * length, t.grad_weights + r * length, i + r, s, grad_mask);
      multiply<W>({t.weights, 1, length}, t.grad_out, channels, queries, t.grad_v, channels, a.tokens, channels, true);
      multiply<W>({t.grad_weights, 1, length}, t.query, channels, queries, t.grad_k, channels, a.tokens, channels,
                  true);
      multiply<W>({t.grad_weights, length, 1}, t.keys, channels, a.tokens, t.result, channels, queries, channels);
      for (int64_t r = 0; r < queries; ++r)
        unpack(t.result + r * channels, scale, row_out(a.grad_q, image, head, i + r));
    }
    for (int64_t j = 0; j < a.tokens; ++j) {
      unpack(t.grad_k + j * channels, W(1), row_out(a.grad_k, image, head, j));
      unpack(t.grad_v + j * channels, W(1), row_out(a.grad_v, image, head, j));
    }
  }

  // Turns a query's logits (without bias) into its attention, and the gradient of its attention into that of its
  // logits; adds to the gradient of the mask.
  void gradients_of_row(W* e, W* grad, int64_t query, const Scratch& s, W* grad_mask) const {
    const W* mask = s.mask;
    W top = add_bias(e, s.bias), own = exponential(e[query] - top), own_mask = mask[query];
    W floor = W(kMaskedEpsilon) / static_cast<W>(a.tokens);
    Vec<W> seen_sum = {}, product_sum = {}, grad_sum = {};
    for (int64_t j = 0; j < length; j += kLanes<W>) {
      Vec<W> value = exp_nonpositive(load(e + j) - top), g = load(grad + j);
      Vec<W> seen = value * load(mask + j);
      store(e + j, value);
      seen_sum += seen;
      product_sum += seen * g;
      grad_sum += g;  // zero in the padding
    }
    W itself = own * (1 - own_mask);  // what a token sees of itself beside what its mask lets through
    W inverse = 1 / (sum(seen_sum) + itself + W(kMaskedEpsilon));
    W delta = (sum(product_sum) + itself * grad[query] + floor * sum(grad_sum)) * inverse;
    W own_grad = own * (grad[query] - delta) * inverse, before = grad_mask[query];
    const W hidden = a.difference ? inverse : W(0);  // a masked token that came back would add to the sum, too
    for (int64_t j = 0; j < length; j += kLanes<W>) {
      Vec<W> exponential = load(e + j), shown = load(mask + j);
      Vec<W> to_mask = exponential * (load(grad + j) - delta) * inverse;
      store(grad_mask + j, load(grad_mask + j) + to_mask / (1 + exponential * (1 - shown) * hidden));
      store(grad + j, to_mask * shown);
      store(e + j, (exponential * shown + floor) * inverse);
    }
    grad_mask[query] = before;
    grad[query] = own_grad;
    e[query] = (own + floor) * inverse;
  }

  // scale * q k^T of a block of queries, in part.weights.
  void logits_of_block(int64_t image, int64_t head, int64_t first, int64_t queries, const Scratch& s) const {
    const Part& t = s.part;
    pack(a.q, image, head, first, queries, static_cast<W>(a.scale), t.query);
    multiply<W>({t.query, channels, 1}, t.keys_t, length, a.head_dim, t.weights, length, queries, length);
  }

  // Adds the bias to a row of logits, -inf in the padding, and returns the largest.
  W add_bias(W* row, const W* bias) const {
    Vec<W> top = Vec<W>{} - std::numeric_limits<W>::infinity();
    for (int64_t j = 0; j < length; j += kLanes<W>) {
      Vec<W> value = load(row + j) + load(bias + j);
      store(row + j, value);
      top = value > top ? value : top;
    }
    W highest = top[0];
    for (int64_t i = 1; i < kLanes<W>; ++i) highest = top[i] > highest ? top[i] : highest;
    return highest;
  }

  static W exponential(W value) { return exp_nonpositive(Vec<W>{} + value)[0]; }

  T* row_out(void* to, int64_t image, int64_t head, int64_t token) const {
    return static_cast<T*>(to) + ((image * a.tokens + token) * a.heads + head) * a.head_dim;
  }

  // (rows, channels), times `scale`; the padding is zero
  void pack(const Heads& from, int64_t image, int64_t head, int64_t first, int64_t rows, W scale, W* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = row_of<T>(from, image, head, first + r);
      for_vectors<W>(a.head_dim,
                     [&](int64_t c, auto load_at, auto) { store(to + r * channels + c, load_at(row + c) * scale); });
    }
  }

  // (D, length); the padding is zero. A block of tokens at a time, so that whole vectors are written.
  void transpose(const Heads& from, int64_t image, int64_t head, W* block, W* to) const {
    constexpr int64_t lanes = kLanes<W>;
    for (int64_t j = 0; j < a.tokens; j += lanes) {
      int64_t rows = std::min(lanes, a.tokens - j);
      pack(from, image, head, j, rows, W(1), block);
      fill(block + rows * channels, (lanes - rows) * channels, W(0));
      for (int64_t d = 0; d < a.head_dim; ++d) {
        Vec<W> column;
        for (int64_t i = 0; i < lanes; ++i) column[i] = block[i * channels + d];
        store(to + d * length + j, column);
      }
    }
  }

  void unpack(const W* from, W scale, T* to) const {
    for_vectors<W>(a.head_dim, [&](int64_t c, auto, auto store_at) { store_at(to + c, load(from + c) * scale); });
  }
};

}  // namespace

void masked_attention(const AttentionArgs& a, const Threads& threads) {
  dispatch(a.type,
           [&](auto example) { for_images(threads, a.images, a.heads, MaskedAttention<decltype(example)>(a, false)); });
}

void masked_attention_backward(const AttentionArgs& a, const Threads& threads) {
  dispatch(a.type,
           [&](auto example) { for_images(threads, a.images, a.heads, MaskedAttention<decltype(example)>(a, true)); });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
