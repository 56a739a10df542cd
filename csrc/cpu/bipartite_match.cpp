// ToMe's matching: the keys' mean over heads, the most similar destination of each source, and which of them merge.
//
// Sources lie in the lanes of vectors: for each of some destinations, six at a time, a tile of products is summed up in
// registers, and what is better than a lane's best takes its place. The matrix of cosines is never written, and no sum
// runs across lanes.
//
// Rows that are equal, bit by bit, have equal cosines wherever they stand: each goes through the same operations in the
// same order. Destinations are compared with `>`, from the first on, so that ties go to the lower position.
//
// The least for B = 16, N = 197, H = 6, D = 64 in float: 9.8 million multiply-adds, 0.1 ms at two vectors of 16 a cycle
// and 3 GHz on one core, and 4.8 MB of keys to read.
#include <limits>

#include "common/bipartition.h"
#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/multiply.h"
#include "cpu/sort.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

// A number for each lane, as wide as W.
template <class W>
using Index = std::conditional_t<sizeof(W) == 8, int64_t, int32_t>;
template <class W>
struct IndicesOf {
  typedef Index<W> type __attribute__((vector_size(DIFFRATE_VECTOR_BYTES)));
};

constexpr int64_t kAhead = 8;  // tokens

// The best destination so far of some sources.
template <class W>
struct Best {
  W* cosine;
  Index<W>* match;
};

// Compares kTileRows destinations, the first of them number `first`, with the sources of so many vectors, of which
// `panel` has channel by channel.
template <class W, int64_t vectors>
void compare(const W* destinations, int64_t stride, int64_t first, const W* panel, int64_t channels, Best<W> best) {
  using Indices = typename IndicesOf<W>::type;
  Vec<W> cosines[kTileRows][vectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    Vec<W> sources[vectors];
#pragma GCC unroll 4  // all of it, here and below: what is indexed at run time would live in memory
    for (int64_t v = 0; v < vectors; ++v) sources[v] = load(panel + (c * vectors + v) * kLanes<W>);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kTileRows; ++i) {
      Vec<W> destination = broadcast(destinations[i * stride + c]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) cosines[i][v] = multiply_add(sources[v], destination, cosines[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int64_t v = 0; v < vectors; ++v) {
    Vec<W> cosine = load(best.cosine + v * kLanes<W>);
    Indices match = read<Indices>(best.match + v * kLanes<W>);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kTileRows; ++i) {
      auto better = cosines[i][v] > cosine;  // NaN is not
      cosine = better ? cosines[i][v] : cosine;
      match = better ? Indices{} + static_cast<Index<W>>(first + i) : match;
    }
    store(best.cosine + v * kLanes<W>, cosine);
    std::memcpy(best.match + v * kLanes<W>, &match, sizeof(match));
  }
}

// Rows that are transposed at once.
template <class W>
constexpr int64_t kTransposed = sizeof(W) == sizeof(float) ? 4 : 1;

// Puts kTransposed rows into a panel of so many lanes, where channel c of row i is at c * lanes + i.
inline void transpose(const float* rows, int64_t stride, int64_t channels, float* panel, int64_t lanes) {
  for (int64_t c = 0; c < channels; c += 4) {  // rows and panels go on to whole vectors
    Quad a = read<Quad>(rows + c), b = read<Quad>(rows + stride + c);
    Quad d = read<Quad>(rows + 2 * stride + c), e = read<Quad>(rows + 3 * stride + c);
    Quad ab_low = pick<0, 4, 1, 5>(a, b), ab_high = pick<2, 6, 3, 7>(a, b);
    Quad de_low = pick<0, 4, 1, 5>(d, e), de_high = pick<2, 6, 3, 7>(d, e);
    const Quad columns[4] = {pick<0, 1, 4, 5>(ab_low, de_low), pick<2, 3, 6, 7>(ab_low, de_low),
                             pick<0, 1, 4, 5>(ab_high, de_high), pick<2, 3, 6, 7>(ab_high, de_high)};
    for (int64_t i = 0; i < 4; ++i) std::memcpy(panel + (c + i) * lanes, &columns[i], sizeof(Quad));
  }
}

inline void transpose(const double* row, int64_t, int64_t channels, double* panel, int64_t lanes) {
  for (int64_t c = 0; c < channels; ++c) panel[c * lanes] = row[c];
}

template <class T>
struct BipartiteMatch {
  using W = Wide<T>;
  static constexpr int64_t kPanel = kTileVectors * kLanes<W>;  // sources of a panel, at most

  const BipartiteMatchArgs& a;
  Bipartition tokens = bipartition(a);
  int64_t stride = padded<W>(a.head_dim);  // of a row in scratch memory
  int64_t rows = (tokens.destinations + kTileRows - 1) / kTileRows * kTileRows;
  int64_t vectors = padded<W>(tokens.sources) / kLanes<W>;

  struct Scratch {
    W* destinations;     // (rows, stride): unit vectors
    Best<W> best;        // (vectors of lanes)
    SortItem<W>* items;  // twice as many as sources: see sort_items
    W* row;              // (parts, kTransposed, stride)
    W* panel;            // (parts, stride, kPanel)
    int64_t bytes;
    Scratch(const BipartiteMatch& op, int64_t parts, char* memory) {
      Arena arena(memory);
      destinations = arena.take<W>(op.rows * op.stride);
      best.cosine = arena.take<W>(op.vectors * kLanes<W>);
      best.match = arena.take<Index<W>>(op.vectors * kLanes<W>);
      items = arena.take<SortItem<W>>(2 * op.tokens.sources);
      row = arena.take<W>(parts * kTransposed<W> * op.stride);
      panel = arena.take<W>(parts * op.stride * kPanel);
      bytes = arena.take<char>(0) - memory;
    }
  };

  int64_t scratch_bytes(int64_t parts) const { return Scratch(*this, parts, nullptr).bytes; }

  // The unit vector that a token is compared by. One with a NaN in it is all NaN, and similar to nothing.
  void load_token(int64_t image, int64_t token, W* row) const {
    // tokens are some distance apart in memory: the next but one of this kind is fetched while this one is read
    const T* keys = row_of<T>(a.keys, image, 0, token);
    const int64_t ahead = (std::min(token + kAhead, a.tokens - 1) - token) * a.keys.stride_token;
    const W share = 1 / static_cast<W>(a.heads);
    Vec<W> squares = {};
    for_vectors<W>(a.head_dim, [&](int64_t c, auto load_at, auto) {
      Vec<W> mean = load_at(keys + c);
      __builtin_prefetch(keys + ahead + c);
      if (a.heads > 1) {
        for (int64_t head = 1; head < a.heads; ++head) {
          const T* of_head = keys + head * a.keys.stride_head + c;
          mean += load_at(of_head);
          __builtin_prefetch(of_head + ahead);
        }
        mean = rounded<T>(mean * share);
      }
      store(row + c, mean);  // a whole vector: rows are padded, and the padding is zero
      squares = multiply_add(mean, mean, squares);
    });
    W norm = static_cast<W>(__builtin_sqrt(sum(squares)));
    W inverse = 1 / (norm > W(kNormEpsilon) || norm != norm ? norm : W(kNormEpsilon));
    for (int64_t c = 0; c < a.head_dim; c += kLanes<W>) store(row + c, load(row + c) * inverse);
  }

  void prepare(int64_t image, char* memory) const {
    if (a.merged == 0) return;
    Scratch s(*this, 1, memory);
    for (int64_t j = 0; j < tokens.destinations; ++j)
      load_token(image, tokens.first_destination + 2 * j, s.destinations + j * stride);
    // the last tile is filled up with what is similar to nothing
    fill(s.destinations + tokens.destinations * stride, (rows - tokens.destinations) * stride,
         std::numeric_limits<W>::quiet_NaN());
    fill(s.best.cosine, vectors * kLanes<W>, -std::numeric_limits<W>::infinity());
    fill(s.best.match, vectors * kLanes<W>, Index<W>(0));  // of a source that is similar to nothing
  }

  // Finds the best destination of the sources of this part.
  void part(int64_t image, char* memory, int64_t p, int64_t parts) const {
    if (a.merged == 0) return;
    Scratch s(*this, parts, memory);
    W* row = s.row + p * kTransposed<W> * stride;
    W* panel = s.panel + p * stride * kPanel;
    const int64_t end = vectors * (p + 1) / parts;
    for (int64_t begin = vectors * p / parts, count; begin < end; begin += count) {
      // panels of about equal width: one of a single vector would leave the multipliers waiting
      int64_t panels = (end - begin + kTileVectors - 1) / kTileVectors;
      count = (end - begin + panels - 1) / panels;
      const int64_t first = begin * kLanes<W>, lanes = count * kLanes<W>;
      for (int64_t i = 0; i < lanes; ++i) {
        // past the last source that once more: what is found for it is not used
        load_token(image, tokens.first_source + 2 * std::min(first + i, tokens.sources - 1),
                   row + i % kTransposed<W> * stride);
        if ((i + 1) % kTransposed<W> == 0) transpose(row, stride, a.head_dim, panel + i + 1 - kTransposed<W>, lanes);
      }
      compare_all<kTileVectors>(count, s.destinations, panel, {s.best.cosine + first, s.best.match + first});
    }
  }

  // Compares all destinations with a panel of `count` vectors of sources.
  template <int64_t most>
  void compare_all(int64_t count, const W* destinations, const W* panel, Best<W> best) const {
    if (count == most) {
      for (int64_t j = 0; j < rows; j += kTileRows)
        compare<W, most>(destinations + j * stride, stride, j, panel, a.head_dim, best);
    } else if constexpr (most > 1) {
      compare_all<most - 1>(count, destinations, panel, best);
    }
  }

  void finish(int64_t image, char* memory, int64_t parts) const {
    constexpr int64_t kStays = -1;
    int64_t* slot = a.slot + image * a.tokens;
    int64_t* of_source = slot + tokens.first_source;
    int64_t* of_destination = slot + tokens.first_destination;
    for (int64_t i = 0; i < tokens.sources; ++i) of_source[2 * i] = kStays;
    if (a.merged > 0) {
      Scratch s(*this, parts, memory);
      for (int64_t i = 0; i < tokens.sources; ++i)
        s.items[i] = {descending_key(s.best.cosine[i]), static_cast<int32_t>(i)};
      sort_items<W>(s.items, tokens.sources);
      for (int64_t rank = 0; rank < a.merged; ++rank) {
        int32_t i = s.items[rank].patch;
        of_source[2 * i] = tokens.first_is_merged_into + s.best.match[i];
      }
    }
    for (int64_t j = 0; j < a.prefix; ++j) slot[j] = j;
    int64_t next = tokens.first_stays;
    for (int64_t i = 0; i < tokens.sources; ++i)
      if (of_source[2 * i] == kStays) of_source[2 * i] = next++;
    for (int64_t j = 0; j < tokens.destinations; ++j) of_destination[2 * j] = next++;
  }
};

}  // namespace

void bipartite_match(const BipartiteMatchArgs& a, const Threads& threads) {
  dispatch(a.type, [&](auto example) {
    const BipartiteMatch<decltype(example)> match{a};
    for_images(threads, a.images, match.vectors, match);
  });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
