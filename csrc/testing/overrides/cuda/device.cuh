// The device of csrc/cuda/device.cuh, emulated on the CPU to test the kernels' logic (never their speed). block.h says
// what it detects; the comments in device.cuh say what the functions do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <bit>

#include "testing/emulation/grid.h"
#include "testing/emulation/schedule.h"

// cuda_fp16.h has made empty macros of the other specifiers. Without these an unsupported use would compile:
#undef __shared__
#undef __constant__
#undef __managed__
#define __launch_bounds__(...)

namespace diffrate::cuda {

using Stream = cudaStream_t;
using emulation::Where;

inline emulation::Block& block() { return emulation::Block::running(); }

// --- the warp

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }

inline void __syncthreads(Where where = Where::current()) { block().barrier(where); }
inline void barrier_of_warps(Where where = Where::current()) { block().barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffffu, Where where = Where::current()) {
  block().collective("__syncwarp", mask, nullptr, [](void* const(&)[emulation::kWarp]) {}, where);
}

template <class T>
struct Shuffle {
  T value;
  int from;
  T result;
  static void perform(void* const (&lanes)[emulation::kWarp]) {
    for (void* lane : lanes) {
      auto* own = static_cast<Shuffle*>(lane);
      if (own) own->result = static_cast<const Shuffle*>(lanes[own->from])->value;
    }
  }
};

template <class T>
T shuffle(const char* what, unsigned mask, T value, int from, Where where) {
  if (!(mask >> from & 1)) block().fail("%s asks lane %d, outside its mask 0x%08x", what, from, mask);
  Shuffle<T> own{value, from, value};
  block().collective(what, mask, &own, Shuffle<T>::perform, where);
  return own.result;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, Where where = Where::current()) {
  return shuffle("__shfl_sync", mask, value, from & (emulation::kWarp - 1), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, Where where = Where::current()) {
  int lane = static_cast<int>(threadIdx.x) % emulation::kWarp;
  return shuffle("__shfl_xor_sync", mask, value, (lane ^ flip) & (emulation::kWarp - 1), where);
}

struct Ballot {
  bool vote;
  unsigned result;
  static void perform(void* const (&lanes)[emulation::kWarp]) {
    unsigned votes = 0;
    for (int lane = 0; lane < emulation::kWarp; ++lane)
      if (lanes[lane] && static_cast<const Ballot*>(lanes[lane])->vote) votes |= 1u << lane;
    for (void* lane : lanes)
      if (lane) static_cast<Ballot*>(lane)->result = votes;
  }
};

inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::current()) {
  Ballot own{predicate != 0, 0};
  block().collective("__ballot_sync", mask, &own, Ballot::perform, where);
  return own.result;
}

struct Minimum {
  unsigned value;
  static void perform(void* const (&lanes)[emulation::kWarp]) {
    unsigned least = UINT32_MAX;
    for (void* lane : lanes)
      if (lane) least = std::min(least, static_cast<const Minimum*>(lane)->value);
    for (void* lane : lanes)
      if (lane) static_cast<Minimum*>(lane)->value = least;
  }
};

inline unsigned __reduce_min_sync(unsigned mask, unsigned value, Where where = Where::current()) {
  Minimum own{value};
  block().collective("__reduce_min_sync", mask, &own, Minimum::perform, where);
  return own.value;
}

// --- shared memory

// As on the device, but with a red zone after each piece, which bytes() counts.
class Shared {
 public:
  explicit Shared(unsigned char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    int64_t start = used_, bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + 15) / 16 * 16 + emulation::kRedZone;
    if (!base_) return nullptr;
    block().hand_out(base_ + start, bytes);
    return reinterpret_cast<T*>(base_ + start);
  }
  int64_t bytes() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

inline unsigned char* shared_memory() { return block().shared_memory(); }
inline int64_t shared_limit() { return emulation::shared_limit(); }
using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* shared) { return static_cast<unsigned char*>(shared); }

inline void copy_async(void* shared, const void* global, bool valid) { block().copy_async(shared, global, valid); }
inline void copy_commit() { block().copy_commit(); }
template <int kPending>
inline void copy_wait() {
  block().copy_wait(kPending);
}

inline void prefetch(const void* global) {
  if (global == nullptr) block().fail("prefetches from nowhere");
}
inline int opaque(int number) { return number; }
inline float reciprocal(float number) { return 1 / number; }

// --- tensor cores

struct MatrixLoad {
  uint32_t* to;
  const void* row;
  template <bool kTransposed>
  static void perform(void* const (&lanes)[emulation::kWarp]) {
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      int g = lane / 4, t = lane % 4;
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          int row = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
          const void* start = static_cast<const MatrixLoad*>(lanes[8 * m + row])->row;
          pair[i] = static_cast<const uint16_t*>(start)[column];
        }
        memcpy(static_cast<MatrixLoad*>(lanes[lane])->to + m, pair, sizeof pair);
      }
    }
  }
};

inline void load_matrices(uint32_t (&to)[4], const void* row, Where where = Where::current()) {
  block().check_shared("load_matrices", row, 16);
  MatrixLoad own{to, row};
  block().collective("load_matrices", 0xffffffffu, &own, MatrixLoad::perform<false>, where);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row, Where where = Where::current()) {
  block().check_shared("load_matrices_transposed", row, 16);
  MatrixLoad own{to, row};
  block().collective("load_matrices_transposed", 0xffffffffu, &own, MatrixLoad::perform<true>, where);
}

inline float widened(__half value) { return __half2float(value); }
inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

// The lower or the upper number of a pair.
template <class T>
float number_in(uint32_t pair, int upper) {
  return widened(std::bit_cast<T>(static_cast<uint16_t>(pair >> 16 * upper)));
}

template <class T>
struct Multiplication {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  static void perform(void* const (&lanes)[emulation::kWarp]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      const auto* own = static_cast<const Multiplication*>(lanes[lane]);
      int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) a[g + i % 2 * 8][2 * t + i / 2 * 8 + j] = number_in<T>(own->a[i], j);
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) b[2 * t + i * 8 + j][g] = number_in<T>(own->b[i], j);
    }
    for (int row = 0; row < 16; ++row) {
      float sums[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
      for (int column = 0; column < 8; ++column)
        static_cast<Multiplication*>(lanes[row % 8 * 4 + column / 2])->d[row / 8 * 2 + column % 2] += sums[column];
    }
  }
};

template <class T>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         Where where = Where::current()) {
  Multiplication<T> own{d, a, {b0, b1}};
  block().collective("multiply_accumulate", 0xffffffffu, &own, Multiplication<T>::perform, where);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4],
                  Where where = Where::current()) {
  float sum[4] = {c[0], c[1], c[2], c[3]};
  multiply_accumulate<T>(sum, a, b0, b1, where);
  memcpy(d, sum, sizeof sum);
}

// --- shared memory of other blocks of the cluster

inline void cluster_barrier_for_shared(Where where = Where::current()) { block().cluster_barrier(where); }
template <class T>
T* of_block(T* mine, int rank) {
  return reinterpret_cast<T*>(block().of_block(reinterpret_cast<unsigned char*>(mine), rank));
}
inline void prefetch_l2(const void* from, int bytes) { block().prefetch(from, bytes); }

// --- clusters and launches

inline void cluster_barrier(Where where = Where::current()) { block().cluster_barrier(where); }

// Few multiprocessors: then one image or a few show what depends on their number.
inline int64_t multiprocessors() { return 8; }
template <class... Parameters>
bool has_clusters(void (*)(Parameters...)) {
  return true;
}

template <class... Parameters>
void prefer_shared_memory(void (*)(Parameters...)) {}

struct Blocks {
  int64_t count;
  int cluster;
  Blocks(int64_t blocks, int cluster_size = 1) : count(blocks), cluster(cluster_size) {}
};

template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), Blocks blocks, int threads, int64_t shared_bytes, Stream,
                   Parameters... arguments) {
  if (blocks.count == 0) return nullptr;
  if (blocks.count > INT32_MAX) return "too many blocks for one launch";
  bool possible = blocks.count > 0 && threads >= 1 && threads <= 1024 && blocks.cluster >= 1 && blocks.cluster <= 8;
  if (!possible || blocks.count % blocks.cluster != 0) return "invalid configuration argument";
  if (shared_bytes < 0 || shared_bytes > shared_limit()) return "invalid argument";  // as cudaFuncSetAttribute says
  emulation::run_grid(blocks.count, blocks.cluster, threads, shared_bytes, [&] { kernel(arguments...); });
  return nullptr;
}

}  // namespace diffrate::cuda
