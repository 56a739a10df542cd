// Products of the small matrices of one attention head, in registers tile by tile.
#pragma once

#include "cpu/simd.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

// The left factor, of which single numbers are read: element (i, k) is at data[i * row + k * column].
template <class W>
struct Factor {
  const W* data;
  int64_t row, column;
};

// Rows times vectors of the largest tile: as many sums as the registers hold beside the factors.
constexpr int64_t kTileRows = DIFFRATE_VECTOR_BYTES >= 32 ? 6 : 4;
constexpr int64_t kTileVectors = DIFFRATE_VECTOR_BYTES == 64 ? 4 : 2;

template <class W, int64_t rows, int64_t vectors>
void multiply_tile(Factor<W> a, const W* b, int64_t b_stride, int64_t depth, W* c, int64_t c_stride, bool add) {
  Vec<W> sums[rows][vectors] = {};
  if (add) {
#pragma GCC unroll 6  // all of it: what is indexed at run time would live in memory
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) sums[i][v] = load(c + i * c_stride + v * kLanes<W>);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<W> right[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) right[v] = load(b + k * b_stride + v * kLanes<W>);
#pragma GCC unroll 6
    for (int64_t i = 0; i < rows; ++i) {
      W left = a.data[i * a.row + k * a.column];
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) sums[i][v] += right[v] * left;
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) store(c + i * c_stride + v * kLanes<W>, sums[i][v]);
}

// The rows that are left after the whole tiles: in one tile of their number.
template <class W, int64_t vectors, int64_t rows>
void multiply_rest(Factor<W> a, const W* b, int64_t b_stride, int64_t depth, W* c, int64_t c_stride, int64_t left,
                   bool add) {
  if (left == rows)
    multiply_tile<W, rows, vectors>(a, b, b_stride, depth, c, c_stride, add);
  else if constexpr (rows > 1)
    multiply_rest<W, vectors, rows - 1>(a, b, b_stride, depth, c, c_stride, left, add);
}

template <class W, int64_t vectors>
void multiply_columns(Factor<W> a, const W* b, int64_t b_stride, int64_t depth, W* c, int64_t c_stride, int64_t rows,
                      bool add) {
  int64_t i = 0;
  auto rest = [&] { return Factor<W>{a.data + i * a.row, a.row, a.column}; };
  for (; i + kTileRows <= rows; i += kTileRows)
    multiply_tile<W, kTileRows, vectors>(rest(), b, b_stride, depth, c + i * c_stride, c_stride, add);
  if (i < rows)
    multiply_rest<W, vectors, kTileRows - 1>(rest(), b, b_stride, depth, c + i * c_stride, c_stride, rows - i, add);
}

// c (rows, columns) = a (rows, depth) b (depth, columns), or += it. `columns` is a multiple of the vector length.
template <class W>
void multiply(Factor<W> a, const W* b, int64_t b_stride, int64_t depth, W* c, int64_t c_stride, int64_t rows,
              int64_t columns, bool add = false) {
  int64_t j = 0;
  for (; j + kTileVectors * kLanes<W> <= columns; j += kTileVectors * kLanes<W>)
    multiply_columns<W, kTileVectors>(a, b + j, b_stride, depth, c + j, c_stride, rows, add);
  if constexpr (kTileVectors > 2) {
    for (; j + 2 * kLanes<W> <= columns; j += 2 * kLanes<W>)
      multiply_columns<W, 2>(a, b + j, b_stride, depth, c + j, c_stride, rows, add);
  }
  for (; j < columns; j += kLanes<W>) multiply_columns<W, 1>(a, b + j, b_stride, depth, c + j, c_stride, rows, add);
}

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
