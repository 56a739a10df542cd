// Rows shared out among the threads of a block chunk by chunk, so that a row of any length leaves no thread idle.
#pragma once

#include "cuda/common.cuh"

namespace diffrate::cuda {

// Which chunks a thread has: every blockDim.x-th of the rows' chunks, one row after the other.
class ChunkPlaces {
 public:
  struct Place {
    int row, chunk;
  };
  __device__ explicit ChunkPlaces(int chunks)
      : chunks_(chunks),
        rows_ahead_(static_cast<int>(blockDim.x / static_cast<unsigned>(chunks))),
        chunks_ahead_(static_cast<int>(blockDim.x % static_cast<unsigned>(chunks))) {}

  __device__ Place first() const {
    return {static_cast<int>(threadIdx.x / static_cast<unsigned>(chunks_)),
            static_cast<int>(threadIdx.x % static_cast<unsigned>(chunks_))};
  }
  __device__ Place after(Place place) const {
    place.row += rows_ahead_;
    place.chunk += chunks_ahead_;
    if (place.chunk >= chunks_) place.chunk -= chunks_, ++place.row;
    return place;
  }

 private:
  int chunks_, rows_ahead_, chunks_ahead_;
};

// A thread asks for so many chunks before it waits for the first: with 768 threads on a multiprocessor 48 KB are
// on their way, and an H200 needs 25.
constexpr int kChunksAhead = 4;

template <class T>
using ChunkBatch = Chunk<T>[kChunksAhead];

// Rows of `channels` numbers, of which load(row, c) asks for a chunk and store(row, c, chunk) takes it.
template <class T>
class RowChunks {
 public:
  static constexpr int kCount = Chunk<T>::kCount;

  __device__ RowChunks(int rows, int64_t channels)
      : rows_(channels > 0 ? rows : 0),
        places_(static_cast<int>(channels > 0 ? (channels + kCount - 1) / kCount : 1)),
        next_(places_.first()) {}

  __device__ bool more() const { return next_.row < rows_; }

  // Where there are more: asks for the next batch.
  template <class Load>
  __device__ __forceinline__ void load(ChunkBatch<T>& batch, Load load_one) const {
    ChunkPlaces::Place place = next_;
#pragma unroll
    for (int u = 0; u < kChunksAhead; ++u, place = places_.after(place))
      // past the end the last row once more: no branch stands between the loads
      batch[u] = load_one(place.row < rows_ ? place.row : rows_ - 1, int64_t{place.chunk} * kCount);
  }
  // Hands the batch on, and goes to the next.
  template <class Store>
  __device__ __forceinline__ void store(const ChunkBatch<T>& batch, Store store_one) {
#pragma unroll
    for (int u = 0; u < kChunksAhead; ++u, next_ = places_.after(next_))
      if (more()) store_one(next_.row, int64_t{next_.chunk} * kCount, batch[u]);
  }

  template <class Load, class Store>
  __device__ __forceinline__ void run(Load load_one, Store store_one) {
    while (more()) {
      ChunkBatch<T> batch;
      load(batch, load_one);
      store(batch, store_one);
    }
  }

 private:
  int rows_;
  ChunkPlaces places_;
  ChunkPlaces::Place next_;
};

// Which rows of an image a block has: `each`, and the last of the image's `blocks` what is left.
struct RowParts {
  int blocks, each;
};
struct PartOfRows {
  int64_t image, first;
  int count;

  __device__ PartOfRows(const RowParts& parts, int64_t rows) {
    const unsigned in_order = blockIdx.x / static_cast<unsigned>(parts.blocks);
    const int64_t part = blockIdx.x - in_order * static_cast<unsigned>(parts.blocks);
    image = in_order;
    first = part * parts.each;
    count = static_cast<int>(rows - first < parts.each ? rows - first : parts.each);
  }
};

// So many blocks that every multiprocessor has two, if there are rows enough; none has more than `most` rows.
inline RowParts parts_of_rows(int64_t images, int64_t rows, int64_t most) {
  constexpr int64_t kBlocksAtOnce = 2, kFewest = 16;  // rows that are worth a block
  auto divided = [](int64_t count, int64_t by) { return (count + by - 1) / by; };
  const int64_t blocks = kBlocksAtOnce * multiprocessors() / (images > 0 ? images : 1);
  int64_t each = blocks > 1 ? divided(rows, blocks) : rows;
  if (each < kFewest) each = kFewest;
  if (each > most) each = most;
  return {static_cast<int>(divided(rows, each)), static_cast<int>(each)};
}

}  // namespace diffrate::cuda
