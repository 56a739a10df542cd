// Sort, prune and merge, reading each kept token about once: what prune_merge and masked_prune_merge share.
//
// The sources of an image (k_p - k_m tokens, few) are loaded first and stay in cache. Then the destinations stream by
// in blocks: a block is copied to the output and, while it is at hand, compared with all sources. At the end only the
// destinations that received a source are read again, from the output.
//
// Rows that are equal, bit by bit, have equal cosines with a source, so that ties go to the lower position: whatever a
// row's position, its norm and its products go through the same operations in the same order (multiply_add leaves the
// compiler no choice), and are compared with `>`, from the first position on, in parts that follow each other.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/access.h"
#include "cpu/images.h"
#include "cpu/layer_norm.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "cpu/sort.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

constexpr int64_t kBlock = 8;  // destinations that are compared while they are in the first-level cache

// Destinations times sources that are compared at once: enough independent sums to keep the multipliers busy, few
// enough for the registers.
constexpr int64_t kRows = DIFFRATE_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kColumns = 4;

// The best destination so far of kColumns sources: cosine (before division by the source's norm) and position.
template <class W>
struct Best {
  typedef std::conditional_t<sizeof(W) == 8, int64_t, int32_t> Index;
  typedef W Cosines __attribute__((vector_size(kColumns * sizeof(W))));
  typedef Index Positions __attribute__((vector_size(kColumns * sizeof(W))));
  Cosines cosine;
  Positions position;
};

// Compares kRows destinations, the first of them at `position`, with kColumns sources. Ties go to the lower position.
// Meanwhile fetches the row of T at `ahead`, a cache line or less with each step: all at once they would stall.
template <class T, class W>
void compare(const W* rows, const W* inverse, int64_t position, const W* columns, int64_t stride, const T* ahead,
             Best<W>& best) {
  Vec<W> sums[kRows][kColumns] = {};
  for (int64_t c = 0; c < stride; c += kLanes<W>) {
    __builtin_prefetch(ahead + c);
    Vec<W> column[kColumns];
    for (int64_t j = 0; j < kColumns; ++j) column[j] = load(columns + j * stride + c);
    for (int64_t i = 0; i < kRows; ++i) {
      Vec<W> row = load(rows + i * stride + c);
      for (int64_t j = 0; j < kColumns; ++j) sums[i][j] = multiply_add(row, column[j], sums[i][j]);
    }
  }
  using Index = typename Best<W>::Index;
#pragma GCC unroll 4  // keeps the sums in registers
  for (int64_t i = 0; i < kRows; ++i) {
    auto cosine = sum_four(sums[i]) * inverse[i];
    typename Best<W>::Positions better = cosine > best.cosine, here = {};
    here += static_cast<Index>(position + i);
    best.cosine = better ? cosine : best.cosine;
    best.position = better ? here : best.position;
  }
}

template <class T>
struct PruneMerge {
  using W = Wide<T>;
  const PruneMergeArgs& a;
  int64_t out_tokens;  // rows of an image in `out`, of which this writes the first k_m
  int64_t stride;      // of a row in scratch memory: channels, rounded up to whole vectors
  int64_t sources;
  int64_t source_groups;  // of kColumns, the last one filled up
  int64_t source_rows;

  PruneMerge(const PruneMergeArgs& args, int64_t out_tokens) : a(args), out_tokens(out_tokens) {
    stride = (a.channels + kLanes<W> - 1) / kLanes<W> * kLanes<W>;
    sources = a.k_p - a.k_m;
    source_groups = (sources + kColumns - 1) / kColumns;
    source_rows = source_groups * kColumns;
  }

  struct Scratch {
    W* sums;
    SortItem<W>* items;  // twice as many: see sort_items
    int32_t* order;
    W* source;          // (source_rows, stride)
    W* source_inverse;  // 1 / norm
    int32_t* head;      // of each destination's list of sources, -1 where it has none
    int32_t* next;
    Best<W>* best;  // (parts, source_groups)
    W* cosine;      // (sources): with the destination that was chosen
    W* block;       // (parts, kBlock, stride)
    int64_t bytes;
    Scratch(const PruneMerge& op, int64_t parts, char* memory) {
      Arena arena(memory);
      sums = arena.take<W>(op.a.tokens);
      items = arena.take<SortItem<W>>(2 * op.a.tokens);
      order = arena.take<int32_t>(op.a.tokens);
      source = arena.take<W>(op.source_rows * op.stride);
      source_inverse = arena.take<W>(op.source_rows);
      head = arena.take<int32_t>(op.a.k_m);
      next = arena.take<int32_t>(op.sources);
      cosine = arena.take<W>(op.sources);
      best = arena.take<Best<W>>(parts * op.source_groups);
      block = arena.take<W>(parts * kBlock * op.stride);
      bytes = arena.take<char>(0) - memory;
    }
  };

  int64_t scratch_bytes(int64_t parts) const { return Scratch(*this, parts, nullptr).bytes; }

  // Loads one input token, with the residual added as eager PyTorch would (rounded to T), widened into `row`, and
  // copies it to `out`, where these are given. Returns 1 / norm.
  W load_token(int64_t image, int64_t token, W* row, T* out) const {
    const T* x = row_of<T>(a.x, image, token);
    const T* residual = a.residual.data ? row_of<T>(a.residual, image, token) : nullptr;
    Vec<W> squares = {};
    for_vectors<W>(a.channels, [&](int64_t c, auto load_at, auto store_at) {
      Vec<W> value = load_at(x + c);
      if (residual) value = rounded<T>(value + load_at(residual + c));
      if (out) store_at(out + c, value);
      if (row) store(row + c, value);  // a whole vector: rows are padded, and the padding is zero
      squares = multiply_add(value, value, squares);
    });
    W norm = static_cast<W>(__builtin_sqrt(sum(squares)));
    return 1 / (norm > W(kNormEpsilon) || norm != norm ? norm : W(kNormEpsilon));
  }

  void copy_token(int64_t image, int64_t token, T* out) const {
    const T* x = row_of<T>(a.x, image, token);
    if (!a.residual.data) {
      std::memcpy(out, x, a.channels * sizeof(T));
      return;
    }
    const T* residual = row_of<T>(a.residual, image, token);
    for_vectors<W>(a.channels, [&](int64_t c, auto load_at, auto store_at) {
      store_at(out + c, load_at(x + c) + load_at(residual + c));
    });
  }

  T* out_row(int64_t image, int64_t position) const {
    return static_cast<T*>(a.out) + (image * out_tokens + position) * a.channels;
  }

  // `row` is a row of `out`, or the same widened.
  template <class From>
  void normalize(int64_t image, int64_t position, const From* row) const {
    if (!a.norm.out) return;
    T* out = static_cast<T*>(a.norm.out) + (image * out_tokens + position) * a.channels;
    normalize_row(a.norm, row, out, a.channels);
  }

  // Sorts, and loads the sources.
  void prepare(int64_t image, char* memory) const {
    Scratch s(*this, 1, memory);
    sort_image<W>(a.importance, image, a.tokens, a.prefix, s.sums, s.items, s.order);
    for (int64_t i = 0; i < sources; ++i)
      s.source_inverse[i] = load_token(image, s.order[a.k_m + i], s.source + i * stride, nullptr);
    fill(s.source + sources * stride, (source_rows - sources) * stride, W(0));
  }

  // Copies the kept tokens of this part and finds the best destination of every source among them.
  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    Scratch s(*this, parts, memory);
    int64_t begin = a.k_m * p / parts, end = a.k_m * (p + 1) / parts;
    Best<W>* best = s.best + p * source_groups;
    for (int64_t j = 0; j < source_groups; ++j)
      best[j] = {typename Best<W>::Cosines{} - std::numeric_limits<W>::infinity(), typename Best<W>::Positions{} - 1};
    for (; begin < end && (begin < a.prefix || sources == 0); ++begin) {
      copy_token(image, s.order[begin], out_row(image, begin));
      normalize(image, begin, out_row(image, begin));
    }

    W* block = s.block + p * kBlock * stride;
    for (; begin < end; begin += kBlock) {
      int64_t rows = std::min(kBlock, end - begin);
      // float and double rows that fill whole vectors are compared where they are written, others in a widened, padded
      // copy
      const W* compared = block;
      if constexpr (std::is_same_v<T, W>) {
        if (stride == a.channels && rows % kRows == 0) compared = out_row(image, begin);
      }
      W inverse[kBlock] = {};
      for (int64_t i = 0; i < rows; ++i)
        inverse[i] = load_token(image, s.order[begin + i], compared == block ? block + i * stride : nullptr,
                                out_row(image, begin + i));
      // rows past the last destination have no cosine: NaN is never better
      for (int64_t i = rows; i % kRows != 0; ++i) {
        fill(block + i * stride, stride, W(0));
        inverse[i] = std::numeric_limits<W>::quiet_NaN();
      }
      // destinations come from anywhere in x: the next ones are fetched while these are compared
      int64_t calls = 0;
      auto ahead = [&](int64_t call) {
        return row_of<T>(a.x, image, s.order[std::min(begin + kBlock + call, end - 1)]);
      };
      for (int64_t j = 0; j < source_groups; ++j) {
        const W* group = s.source + j * kColumns * stride;
        for (int64_t i = 0; i < rows; i += kRows)
          compare(compared + i * stride, inverse + i, begin + i, group, stride, ahead(calls++), best[j]);
      }
      // at once, while the rows are near: those that something is merged into once more
      for (int64_t i = 0; i < rows; ++i) normalize(image, begin + i, compared + i * stride);
    }
  }

  // Chooses among the parts' destinations, and gives each destination the mean over itself and its sources.
  void merge(int64_t image, const Scratch& s, int64_t parts) const {
    fill(s.head, a.k_m, int32_t{-1});
    // last to first, so that each list ends up in ascending order
    for (int64_t i = sources - 1; i >= 0; --i) {
      int64_t group = i / kColumns, lane = i % kColumns;
      W cosine = s.best[group].cosine[lane];
      int64_t to = s.best[group].position[lane];
      for (int64_t p = 1; p < parts; ++p) {
        const Best<W>& other = s.best[p * source_groups + group];
        if (other.cosine[lane] > cosine) {
          cosine = other.cosine[lane];
          to = other.position[lane];
        }
      }
      s.cosine[i] = cosine * s.source_inverse[i];
      if (to < 0) {  // a source that is similar to nothing (NaN features) goes to the first destination
        to = a.prefix;
        s.cosine[i] = std::numeric_limits<W>::quiet_NaN();
      }
      s.next[i] = s.head[to];
      s.head[to] = static_cast<int32_t>(i);
    }
    for (int64_t to = a.prefix; to < a.k_m; ++to)
      if (s.head[to] >= 0) merge_features(image, s, to);
  }

  // Calls body(source, destination), by ascending destination and then source.
  template <class Body>
  void for_merged(const Scratch& s, Body body) const {
    if (sources == 0) return;
    for (int64_t to = a.prefix; to < a.k_m; ++to)
      for (int32_t i = s.head[to]; i >= 0; i = s.next[i]) body(i, to);
  }

  // What a source counts for when sizes add up.
  W size_of_source(int64_t image, const Scratch& s, int64_t source) const {
    W size = size_of<W>(a.size, image, s.order[a.k_m + source]);
    return a.cosine_sizes ? size * s.cosine[source] : size;
  }

  void merge_features(int64_t image, const Scratch& s, int64_t to) const {
    auto weight = [&](int64_t position) {
      W size = a.weighted_mean ? size_of<W>(a.size, image, s.order[position]) : W(1);
      return size > W(kTinySize) ? size : W(kTinySize);
    };
    W own = weight(to), total = own;
    for (int32_t i = s.head[to]; i >= 0; i = s.next[i]) total += weight(a.k_m + i);
    T* out = out_row(image, to);
    for_vectors<W>(a.channels, [&](int64_t c, auto load_at, auto store_at) {
      Vec<W> mean = load_at(out + c) * own;
      for (int32_t i = s.head[to]; i >= 0; i = s.next[i]) mean += load(s.source + i * stride + c) * weight(a.k_m + i);
      store_at(out + c, mean / total);
    });
    normalize(image, to, out_row(image, to));
  }
};

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
