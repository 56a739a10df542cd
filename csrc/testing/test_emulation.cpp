// Tests of the emulated device (csrc/emulation/): kernels that are right give the right result in every order of
// threads, and each planted defect is found. Kernels that must stop the program run in a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device.cuh"
#include "testing/emulation/sanitizer.h"

namespace diffrate::cuda {
namespace {

using emulation::Order;

constexpr unsigned kAllLanes = 0xffffffffu;

int passed = 0, failed = 0;

void check(bool good, const std::string& what) {
  ++(good ? passed : failed);
  if (!good) std::printf("FAILED: %s\n", what.c_str());
}

const emulation::Schedule kSchedules[] = {
    {Order::forward, 0}, {Order::reverse, 0}, {Order::random, 1}, {Order::random, 2}, {Order::random, 3}};

std::string name_of(const emulation::Schedule& schedule) {
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

// Expects that `body` stops the program with `message` on stderr. What follows one block's defect is of no interest.
template <class Body>
void expect_abort(const std::string& what, const std::string& message, Body body) {
  int pipe_ends[2];
  if (pipe(pipe_ends) != 0) std::abort();
  std::fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    dup2(pipe_ends[1], STDERR_FILENO);
    close(pipe_ends[0]);
    body();
    _exit(0);
  }
  close(pipe_ends[1]);
  std::string output;
  char buffer[4096];
  for (ssize_t n; (n = read(pipe_ends[0], buffer, sizeof buffer)) > 0;) output.append(buffer, n);
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  bool died = !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  bool said = output.find(message) != std::string::npos;
  check(died && said, what + (died ? ": another message: " + output : ": not found"));
}

int64_t floats(int64_t count) {
  Shared shared(nullptr);
  shared.take<float>(count);
  return shared.bytes();
}

// --- kernels that are right

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

__device__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// One warp per row of 32 numbers.
__global__ void softmax_kernel(const float* x, float* out) {
  int i = static_cast<int>(threadIdx.x);
  float top = x[i];
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
  float e = expf(x[i] - top);
  out[i] = e / warp_sum(e);
}

bool softmax_is_right() {
  constexpr int rows = 4;
  std::vector<float> x(rows * 32), out(rows * 32);
  for (int i = 0; i < rows * 32; ++i) x[i] = std::sin(static_cast<float>(i)) * 5;
  launch(softmax_kernel, 1, rows * 32, 0, Stream{}, (const float*)x.data(), out.data());
  bool right = true;
  for (int row = 0; row < rows; ++row) {
    double total = 0;
    for (int i = 0; i < 32; ++i) total += std::exp(double(x[row * 32 + i]));
    for (int i = row * 32; i < row * 32 + 32; ++i)
      right = right && std::abs(out[i] - std::exp(double(x[i])) / total) < 1e-6;
  }
  return right;
}

// Votes, shuffles and barriers of a part of a warp, while the other part does something else.
__global__ void votes_kernel(unsigned* votes, int* shuffled) {
  int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  unsigned odd = __ballot_sync(kAllLanes, lane & 1);
  if (lane < 8) {
    unsigned some = __ballot_sync(0xffu, lane == 3 || lane == 4);
    __syncwarp(0xffu);
    shuffled[thread] = __shfl_sync(0xffu, thread, 7 - lane);
    votes[thread] = some;
  } else {
    shuffled[thread] = __shfl_sync(0xffffff00u, thread, 31);
    votes[thread] = odd;
  }
}

bool votes_are_right() {
  unsigned votes[64];
  int shuffled[64];
  launch(votes_kernel, 1, 64, 0, Stream{}, +votes, +shuffled);
  bool right = __popc(0xf0u) == 4 && __ffs(0x18) == 4 && __ffs(0) == 0;
  for (int thread = 0; thread < 64; ++thread) {
    int lane = thread % 32, first = thread - lane;
    right = right && votes[thread] == (lane < 8 ? 0x18u : 0xaaaaaaaau) &&
            shuffled[thread] == first + (lane < 8 ? 7 - lane : 31);
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

// d = a b + d for a (16, 16) and b (16, 8), in two ways: fragments gathered by the layout that device.cuh states, and
// loaded as matrices from shared memory.
template <class T>
__global__ void multiply_kernel(const T* a, const T* b, float* d, bool from_shared) {
  int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  auto pair = [](T low, T high) {
    T both[2] = {low, high};
    uint32_t bits;
    memcpy(&bits, both, sizeof bits);
    return bits;
  };
  uint32_t left[4], right[4];
  if (from_shared) {
    Shared shared(shared_memory());
    T* rows_of_a = shared.take<T>(16 * 16);
    T* rows_of_b = shared.take<T>(16 * 8);
    for (int i = lane; i < 16 * 16; i += 32) rows_of_a[i] = a[i];
    for (int i = lane; i < 16 * 8; i += 32) rows_of_b[i] = b[i];
    __syncwarp();
    load_matrices(left, rows_of_a + lane % 16 * 16 + lane / 16 * 8);
    load_matrices_transposed(right, rows_of_b + lane % 16 * 8);  // the third and fourth matrix are not used
  } else {
    for (int i = 0; i < 4; ++i) {
      const T* from = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      left[i] = pair(from[0], from[1]);
    }
    for (int i = 0; i < 2; ++i) right[i] = pair(b[(2 * t + i * 8) * 8 + g], b[(2 * t + 1 + i * 8) * 8 + g]);
  }
  float own[4] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1], d[(g + 8) * 8 + 2 * t], d[(g + 8) * 8 + 2 * t + 1]};
  multiply_accumulate<T>(own, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = own[i];
}

template <class T>
bool product_is_right(bool from_shared) {
  T a[16 * 16], b[16 * 8];
  float d[16 * 8];
  double expected[16 * 8];
  for (int i = 0; i < 16 * 16; ++i) a[i] = T(static_cast<float>(i * 7 % 31 - 15));
  for (int i = 0; i < 16 * 8; ++i) b[i] = T(static_cast<float>(i * 5 % 29 - 14) / 4);
  for (int i = 0; i < 16 * 8; ++i) expected[i] = d[i] = static_cast<float>(i);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column)
      for (int k = 0; k < 16; ++k)
        expected[row * 8 + column] += double(float(a[row * 16 + k])) * double(float(b[k * 8 + column]));
  Shared shared(nullptr);
  shared.take<T>(16 * 16);
  shared.take<T>(16 * 8);
  launch(multiply_kernel<T>, 1, 32, shared.bytes(), Stream{}, (const T*)a, (const T*)b, +d, from_shared);
  bool right = true;
  for (int i = 0; i < 16 * 8; ++i) right = right && d[i] == expected[i];
  return right;
}

// load_matrices by itself: lane (g, t) gets of matrix m the pair (g, 2t), (g, 2t + 1); transposed (2t, g), (2t + 1, g).
__global__ void matrices_kernel(bool transposed, uint16_t* out) {
  int lane = static_cast<int>(threadIdx.x);
  uint16_t* memory = Shared(shared_memory()).take<uint16_t>(4 * 64);
  for (int i = lane; i < 4 * 64; i += 32) memory[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t loaded[4];
  if (transposed) {
    load_matrices_transposed(loaded, memory + lane * 8);
  } else {
    load_matrices(loaded, memory + lane * 8);
  }
  memcpy(out + lane * 8, loaded, sizeof loaded);
}

bool matrices_are_right(bool transposed) {
  uint16_t out[32 * 8];
  Shared shared(nullptr);
  shared.take<uint16_t>(4 * 64);
  launch(matrices_kernel, 1, 32, shared.bytes(), Stream{}, transposed, +out);
  bool right = true;
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m)
      for (int i = 0; i < 2; ++i) {
        int across = lane / 4, along = lane % 4 * 2 + i;
        int row = transposed ? along : across, column = transposed ? across : along;
        right = right && out[lane * 8 + 2 * m + i] == m * 64 + row * 8 + column;
      }
  return right;
}

// Each block, each thread writes its own number once, whatever the order, from several threads of the process.
__global__ void number_kernel(int64_t* out) {
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  out[i] += i + int64_t{gridDim.x};
}

bool all_blocks_run() {
  bool right[3] = {};
  std::vector<std::thread> threads;
  for (bool& own : right)
    threads.emplace_back([&own] {
      for (int size : {96, 1, 1024, 7}) {
        std::vector<int64_t> out(13 * size);
        launch(number_kernel, 13, size, 0, Stream{}, out.data());
        own = true;
        for (size_t i = 0; i < out.size(); ++i) own = own && out[i] == static_cast<int64_t>(i) + 13;
        if (!own) return;
      }
    });
  for (auto& thread : threads) thread.join();
  return right[0] && right[1] && right[2];
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

// The order of threads before and after a barrier, and of blocks.
__global__ void order_kernel(std::vector<int>* threads, std::vector<int>* blocks) {
  threads[0].push_back(static_cast<int>(threadIdx.x));
  __syncthreads();
  threads[1].push_back(static_cast<int>(threadIdx.x));
  if (threadIdx.x == 0) blocks->push_back(static_cast<int>(blockIdx.x));
}

void test_orders() {
  auto orders = [](Order order, uint64_t seed, int blocks) {
    emulation::schedule() = {order, seed};
    std::vector<std::vector<int>> seen(3);
    launch(order_kernel, blocks, 64, 0, Stream{}, seen.data(), &seen[2]);
    return seen;
  };
  std::vector<int> ascending(64);
  for (int i = 0; i < 64; ++i) ascending[i] = i;
  std::vector<int> descending(ascending.rbegin(), ascending.rend());
  auto forward = orders(Order::forward, 1, 1), reverse = orders(Order::reverse, 1, 1);
  check(forward[0] == ascending && forward[1] == ascending, "forward order");
  check(reverse[0] == descending && reverse[1] == descending, "reverse order");
  check(orders(Order::forward, 1, 64)[2] == ascending, "forward order of blocks");
  check(orders(Order::reverse, 1, 64)[2] == descending, "reverse order of blocks");
  auto random = orders(Order::random, 1, 64);
  check(random[0] != random[1] && random[2] != ascending, "random order");
  check(random == orders(Order::random, 1, 64), "the same random order from the same seed");
  check(random != orders(Order::random, 2, 64), "another random order from another seed");
}

// --- planted defects

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void exited_block_kernel() {
  if (blockIdx.x != 1) cluster_barrier();
}
__global__ void divergent_cluster_barrier_kernel() {
  if (threadIdx.x != 7) cluster_barrier();
}
__global__ void barrier_and_shuffle_kernel(int* out) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    *out = __shfl_sync(kAllLanes, 1, 0);
  }
}
__global__ void exited_lane_kernel(int* out) {
  if (threadIdx.x % 32 < 16) *out = __shfl_sync(kAllLanes, 1, 0);
}
__global__ void missing_lane_kernel() { __syncwarp(); }  // in a warp that is not full
__global__ void two_masks_kernel(unsigned* out) { *out = __ballot_sync(threadIdx.x < 16 ? kAllLanes : 0xffff0000u, 1); }
__global__ void own_mask_kernel(unsigned* out) { *out = __ballot_sync(0xffffu, 1); }
__global__ void outside_mask_kernel(int* out) {
  if (threadIdx.x < 16) *out = __shfl_sync(0xffffu, 1, 16);
}
__global__ void half_a_product_kernel() {
  float d[4] = {};
  uint32_t a[4] = {};
  if (threadIdx.x < 16) multiply_accumulate<__half>(d, a, 0, 0);
}
__global__ void misaligned_copy_kernel(const float* x, int in_shared, int in_global) {
  float* memory = Shared(shared_memory()).take<float>(8);
  copy_async(memory + in_shared, x + in_global, true);
}
__global__ void stray_copy_kernel(const float* x) {
  float* memory = Shared(shared_memory()).take<float>(8);
  copy_async(memory + 8, x, true);
}
__global__ void misaligned_row_kernel() {
  uint16_t* memory = Shared(shared_memory()).take<uint16_t>(32 * 9);
  uint32_t to[4];
  load_matrices(to, memory + threadIdx.x * 9);
}
__global__ void overlap_kernel() {
  Shared(shared_memory()).take<float>(8);
  Shared(shared_memory()).take<float>(9);
}
__global__ void write_past_end_kernel(float* out) {
  float* memory = Shared(shared_memory()).take<float>(8);
  memory[threadIdx.x] = 1;
  *out = memory[0];
}
__global__ void read_shared_kernel(float* out, int at) { *out = Shared(shared_memory()).take<float>(8)[at]; }
__global__ void read_global_kernel(const float* x, float* out, int at) { *out = x[at]; }

void test_planted_defects() {
  bool differs = false;
  for (const auto& schedule : kSchedules) {
    emulation::schedule() = schedule;
    differs = differs || !sums_are_right<false>();
  }
  check(differs, "missing barriers show in some order");

  differs = false;
  for (const auto& schedule : kSchedules) {
    emulation::schedule() = schedule;
    differs = differs || !gifts_arrive<false>();
  }
  check(differs, "missing barriers of a cluster show in some order");

  emulation::schedule() = kSchedules[2];
  check(!streamed_sums_are_right<Defect::no_wait>(), "missing copy_wait");
  check(!streamed_sums_are_right<Defect::short_wait>(), "copy_wait that leaves one group too many");
  check(!streamed_sums_are_right<Defect::no_commit>(), "missing copy_commit");
  check(!streamed_sums_are_right<Defect::early_commit>(), "copies after their copy_commit");
  check(!streamed_sums_are_right<Defect::no_barrier>(), "a buffer that is filled while others read it");
  float number = 0;
  launch(read_shared_kernel, 1, 1, floats(8), Stream{}, &number, 7);
  check(std::isnan(number), "uninitialised shared memory");

  int out;
  unsigned votes;
  expect_abort("barrier that some threads never reach", "waits at __syncthreads",
               [] { launch(divergent_barrier_kernel, 2, 64, 0, Stream{}); });
  expect_abort("barrier that some threads never reach: who", "thread 40, which has exited",
               [] { launch(divergent_barrier_kernel, 2, 64, 0, Stream{}); });
  expect_abort("two barriers", "thread 40, which waits at __syncthreads",
               [] { launch(two_barriers_kernel, 1, 64, 0, Stream{}); });
  expect_abort("cluster with a block that has exited", "waits at cluster_barrier",
               [] { launch(exited_block_kernel, Blocks(2, 2), 32, 0, Stream{}); });
  expect_abort("cluster with a block that has exited: which", "for block 1, which has exited",
               [] { launch(exited_block_kernel, Blocks(2, 2), 32, 0, Stream{}); });
  expect_abort("cluster barrier that some threads never reach", "for thread 7, which has exited",
               [] { launch(divergent_cluster_barrier_kernel, Blocks(2, 2), 32, 0, Stream{}); });
  expect_abort("barrier and shuffle", "waits at __shfl_sync with mask 0xffffffff",
               [&] { launch(barrier_and_shuffle_kernel, 1, 32, 0, Stream{}, &out); });
  expect_abort("mask with an exited lane", "thread 16, which has exited",
               [&] { launch(exited_lane_kernel, 1, 64, 0, Stream{}, &out); });
  expect_abort("mask with a lane that does not exist", "thread 40, which does not exist",
               [] { launch(missing_lane_kernel, 1, 40, 0, Stream{}); });
  expect_abort("two masks", "which waits at __ballot_sync with mask 0xffff0000",
               [&] { launch(two_masks_kernel, 1, 17, 0, Stream{}, &votes); });
  expect_abort("mask without the own lane", "which lacks its own lane",
               [&] { launch(own_mask_kernel, 1, 32, 0, Stream{}, &votes); });
  expect_abort("shuffle from outside the mask", "asks lane 16, outside its mask 0x0000ffff",
               [&] { launch(outside_mask_kernel, 1, 32, 0, Stream{}, &out); });
  expect_abort("product of half a warp", "waits at multiply_accumulate",
               [] { launch(half_a_product_kernel, 1, 32, 0, Stream{}); });

  alignas(16) static float x[8] = {};
  const float* start = x;
  expect_abort("misaligned copy: shared", "not a multiple of 16",
               [=] { launch(misaligned_copy_kernel, 1, 1, floats(8), Stream{}, start, 1, 0); });
  expect_abort("misaligned copy: global", "reads an address that is not a multiple of 16",
               [=] { launch(misaligned_copy_kernel, 1, 1, floats(8), Stream{}, start, 0, 1); });
  expect_abort("copy to outside shared memory", "not inside a piece",
               [=] { launch(stray_copy_kernel, 1, 1, floats(8), Stream{}, start); });
  expect_abort("misaligned matrix row", "load_matrices: an address that is not a multiple of 16",
               [] { launch(misaligned_row_kernel, 1, 32, floats(32 * 9), Stream{}); });
  expect_abort("pieces that overlap", "overlaps another one",
               [] { launch(overlap_kernel, 1, 1, floats(64), Stream{}); });
  expect_abort("more shared memory than given", "but the launch gave 32",
               [&] { launch(read_shared_kernel, 1, 1, 32, Stream{}, &number, 0); });

  if (emulation::kAddressSanitizer) {
    expect_abort("write past the end of shared memory", "use-after-poison",
                 [&] { launch(write_past_end_kernel, 1, 9, floats(8), Stream{}, &number); });
    expect_abort("read past the end of shared memory", "use-after-poison",
                 [&] { launch(read_shared_kernel, 1, 1, floats(8), Stream{}, &number, 8); });
    std::unique_ptr<float[]> global(new float[8]());
    expect_abort("read past the end of global memory", "heap-buffer-overflow",
                 [&] { launch(read_global_kernel, 1, 1, 0, Stream{}, (const float*)global.get(), &number, 8); });
  } else {
    expect_abort("write past the end of shared memory", "wrote past the end of a piece",
                 [&] { launch(write_past_end_kernel, 1, 9, floats(8), Stream{}, &number); });
    std::printf("skipped: reads out of bounds, which only the address sanitizer finds\n");
  }
}

void test_launch_errors() {
  int64_t out = 0;
  auto error = [&](Blocks blocks, int threads, int64_t bytes) {
    return launch(number_kernel, blocks, threads, bytes, Stream{}, &out) != nullptr;
  };
  check(!error(0, 32, 0), "no blocks: nothing to do");
  check(error(int64_t{INT32_MAX} + 1, 32, 0), "too many blocks");
  check(error(1, 1025, 0), "too many threads");
  check(error(Blocks(16, 16), 32, 0), "too large a cluster");
  check(error(Blocks(6, 4), 32, 0), "part of a cluster");
  check(error(1, 32, shared_limit() + 1), "too much shared memory");
  check(out == 0, "failed launches run nothing");
}

}  // namespace
}  // namespace diffrate::cuda

int main() {
  using namespace diffrate::cuda;
  in_all_orders("sum of a block", sums_are_right<true>);
  in_all_orders("softmax of a warp", softmax_is_right);
  in_all_orders("votes and shuffles", votes_are_right);
  in_all_orders("copies in the background", streamed_sums_are_right<Defect::none>);
  for (bool from_shared : {false, true}) {
    in_all_orders("product in float16", [&] { return product_is_right<__half>(from_shared); });
    in_all_orders("product in bfloat16", [&] { return product_is_right<__nv_bfloat16>(from_shared); });
  }
  in_all_orders("matrices", [] { return matrices_are_right(false); });
  in_all_orders("matrices, transposed", [] { return matrices_are_right(true); });
  in_all_orders("clusters", gifts_arrive<true>);
  in_all_orders("all blocks, on several threads", all_blocks_run);
  test_orders();
  test_launch_errors();
  test_planted_defects();
  std::printf("emulated device: %d passed, %d failed\n", passed, failed);
  return failed != 0;
}
