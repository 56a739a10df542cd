// Tests of the emulated device (csrc/testing/emulation/): kernels that are right give the right result in every order
// of threads.
#include <algorithm>
#include <cmath>
#include <thread>

#include "testing/emulation_cases.h"

namespace diffrate::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

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

// The least of a warp and of its upper half.
__global__ void least_kernel(const unsigned* x, unsigned* out) {
  int thread = static_cast<int>(threadIdx.x);
  out[thread] = __reduce_min_sync(kAllLanes, x[thread]);
  if (thread % 32 >= 16) out[thread] = __reduce_min_sync(0xffff0000u, x[thread]);
}

bool least_is_right() {
  unsigned x[64], out[64];
  for (unsigned i = 0; i < 64; ++i) x[i] = (i * 37 + 5) % 64 + 0x80000000u;
  launch(least_kernel, 1, 64, 0, Stream{}, (const unsigned*)x, +out);
  bool right = __ffsll(int64_t{1} << 40) == 41 && __ffsll(0) == 0;
  for (int i = 0; i < 64; ++i) {
    int first = i % 32 < 16 ? i / 32 * 32 : i / 32 * 32 + 16;
    right = right && out[i] == *std::min_element(x + first, x + i / 32 * 32 + 32);
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
  in_all_orders("least of a warp", least_is_right);
  in_all_orders("copies in the background", streamed_sums_are_right<Defect::none>);
  for (bool from_shared : {false, true}) {
    in_all_orders("product in float16", [&] { return product_is_right<__half>(from_shared); });
    in_all_orders("product in bfloat16", [&] { return product_is_right<__nv_bfloat16>(from_shared); });
  }
  in_all_orders("matrices", [] { return matrices_are_right(false); });
  in_all_orders("matrices, transposed", [] { return matrices_are_right(true); });
  in_all_orders("clusters", gifts_arrive<true>);
  in_all_orders("shared memory of clusters", shared_gifts_arrive<SharedRing::right>);
  in_all_orders("all blocks, on several threads", all_blocks_run);
  test_orders();
  test_launch_errors();
  return diffrate::testing::report("emulated device");
}
