// What the tests of the emulated device share: orders of threads, and the kernels that are right in one form and have
// planted defects in others.
#pragma once

#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "testing/checks.h"

namespace diffrate::cuda {

using emulation::Order;

using testing::check;

inline const emulation::Schedule kSchedules[] = {
    {Order::forward, 0}, {Order::reverse, 0}, {Order::random, 1}, {Order::random, 2}, {Order::random, 3}};

inline std::string name_of(const emulation::Schedule& schedule) {
  const char* names[] = {"forward", "reverse", "random"};
  return std::string(", order ") + names[static_cast<int>(schedule.order)] + " " + std::to_string(schedule.seed);
}

// Runs the test in every order.
template <class Test>
void in_all_orders(const std::string& what, Test test) {
  for (const auto& schedule : kSchedules) {
    emulation::schedule() = schedule;
    check(test(), what + name_of(schedule));
  }
}

inline int64_t floats(int64_t count) {
  Shared shared(nullptr);
  shared.take<float>(count);
  return shared.bytes();
}

// One block per row: the sum of its numbers, by a tree in shared memory. Without its barriers: a planted defect.
template <bool kBarriers>
__global__ void sum_kernel(const float* x, float* out) {
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float* partial = Shared(shared_memory()).take<float>(threads);
  partial[thread] = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int half = threads / 2; half > 0; half /= 2) {
    if constexpr (kBarriers) __syncthreads();
    if (thread < half) partial[thread] += partial[thread + half];
  }
  if (thread == 0) out[blockIdx.x] = partial[0];
}

template <bool kBarriers>
bool sums_are_right() {
  constexpr int blocks = 5, threads = 256;
  std::vector<float> x(blocks * threads), out(blocks);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17);
  const char* error =
      launch(sum_kernel<kBarriers>, blocks, threads, floats(threads), Stream{}, (const float*)x.data(), out.data());
  bool right = error == nullptr;
  for (int block = 0; block < blocks; ++block) {
    float expected = 0;
    for (int i = 0; i < threads; ++i) expected += x[block * threads + i];
    right = right && out[block] == expected;
  }
  return right;
}

// Adds tiles of four numbers per thread, each copied in the background while the one before is added up. The last tile
// is half valid. Each thread reads what its neighbour copied. Without a wait or a barrier: planted defects.
enum class Defect { none, no_wait, short_wait, no_commit, early_commit, no_barrier };
template <Defect kDefect>
__global__ void stream_kernel(const float* x, int64_t tiles, int64_t valid, float* out) {
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  Shared shared(shared_memory());
  float* buffers[2] = {shared.take<float>(4 * threads), shared.take<float>(4 * threads)};
  auto fetch = [&](int64_t tile) {
    int64_t at = (tile * threads + thread) * 4;
    if constexpr (kDefect == Defect::early_commit) copy_commit();
    if (tile < tiles) copy_async(buffers[tile % 2] + 4 * thread, at < valid ? x + at : x, at < valid);
    if constexpr (kDefect != Defect::no_commit && kDefect != Defect::early_commit) copy_commit();
  };
  float sum = 0;
  fetch(0);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    if constexpr (kDefect != Defect::no_wait) copy_wait<kDefect == Defect::short_wait ? 2 : 1>();
    __syncthreads();
    const float* read = buffers[tile % 2] + (thread + 1) % threads * 4;
    for (int i = 0; i < 4; ++i) sum += read[i];
    if constexpr (kDefect != Defect::no_barrier) __syncthreads();
  }
  out[thread] = sum;
}

template <Defect kDefect>
bool streamed_sums_are_right() {
  constexpr int64_t threads = 64, tiles = 5, valid = (tiles * threads - threads / 2) * 4;
  std::vector<float> x(valid), out(threads);
  for (int64_t i = 0; i < valid; ++i) x[i] = static_cast<float>(i % 23);
  Shared shared(nullptr);
  for (int i = 0; i < 2; ++i) shared.take<float>(4 * threads);
  launch(stream_kernel<kDefect>, 1, threads, shared.bytes(), Stream{}, (const float*)x.data(), tiles, valid,
         out.data());
  bool right = true;
  for (int64_t thread = 0; thread < threads; ++thread) {
    float expected = 0;
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t i = 0; i < 4; ++i) {
        int64_t at = (tile * threads + (thread + 1) % threads) * 4 + i;
        if (at < valid) expected += x[at];
      }
    right = right && out[thread] == expected;
  }
  return right;
}

// Each block gives its number to the next block of its cluster, twice, through device memory. Without the barrier of
// the cluster in between: a planted defect.
template <bool kBarrier>
__global__ void ring_kernel(int* gifts, int* out) {
  int block = static_cast<int>(blockIdx.x), next = block / 4 * 4 + (block + 1) % 4;
  int own = block;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) gifts[round * 12 + next] = own;
    if constexpr (kBarrier) cluster_barrier();
    own = gifts[round * 12 + block];
  }
  __syncthreads();
  if (threadIdx.x == 63) out[block] = own;
}

template <bool kBarrier>
bool gifts_arrive() {
  int gifts[24] = {}, out[12] = {};
  bool right = launch(ring_kernel<kBarrier>, Blocks(12, 4), 64, 0, Stream{}, +gifts, +out) == nullptr;
  for (int block = 0; block < 12; ++block) right = right && out[block] == block / 4 * 4 + (block + 2) % 4;
  return right;
}

// The same through shared memory: each block writes to that of the next one, then reads in that of the one before it
// what that one has. Without the barriers between writing and reading, and between reading and writing again: planted
// defects. `early` reaches for another block before it is known to have started, `late` when it may have exited.
enum class SharedRing { right, no_barrier, no_second_barrier, early, late };
template <SharedRing kRing>
__global__ void shared_ring_kernel(int* out) {
  int block = static_cast<int>(blockIdx.x), next = (block + 1) % 4, previous = (block + 3) % 4;
  Shared shared(shared_memory());
  int *gift = shared.take<int>(1), *shown = shared.take<int>(1);
  if constexpr (kRing != SharedRing::early) cluster_barrier_for_shared();
  if (threadIdx.x == 0) *of_block(gift, next) = block;
  if constexpr (kRing != SharedRing::no_barrier) cluster_barrier();
  if (threadIdx.x == 0) *shown = *gift;
  if constexpr (kRing != SharedRing::no_barrier) cluster_barrier_for_shared();
  int own = *of_block(shown, previous);
  if constexpr (kRing != SharedRing::no_second_barrier && kRing != SharedRing::late) cluster_barrier();
  if constexpr (kRing == SharedRing::no_second_barrier) {
    if (threadIdx.x == 0) *shown = -1;
    cluster_barrier();
  }
  if (kRing == SharedRing::late && threadIdx.x == 0) own = *of_block(shown, previous);
  if (threadIdx.x == 63) out[block] = own;
}

template <SharedRing kRing>
bool shared_gifts_arrive() {
  int out[12] = {};
  bool right = launch(shared_ring_kernel<kRing>, Blocks(12, 4), 64, 2 * floats(1), Stream{}, +out) == nullptr;
  for (int block = 0; block < 12; ++block) right = right && out[block] == block / 4 * 4 + (block + 2) % 4;
  return right;
}

}  // namespace diffrate::cuda
