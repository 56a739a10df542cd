// Cases of the tests that run once for each instruction set of the CPU (DIFFRATE_CPU_CAPABILITY) and once with the
// emulated CUDA kernels in their place (emulated_kernels.cpp). Mostly for the sanitizers: every buffer is exactly as
// long as it must be. Values are compared with plain loops in double. Python tests the operators in depth.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "testing/checks.h"

namespace diffrate::testing {

// The name of the table that emulated_kernels.cpp puts in the place of the CPU's.
inline const char* const kEmulatedKernels = "emulated CUDA kernels";

inline void check(bool good, const std::string& what, int64_t tokens, int64_t channels) {
  check(good, what + " (N = " + std::to_string(tokens) + ", C = " + std::to_string(channels) + ")");
}

inline bool near(double value, double expected, double tolerance = 2e-5) {
  return std::abs(value - expected) <= tolerance * (1 + std::abs(expected));
}

inline void run_on_threads(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i) threads.emplace_back(body, context, i, i + 1);
  for (auto& thread : threads) thread.join();
}

// One thread, several and many; of the emulated kernels, which take none, one.
inline std::vector<cpu::Threads> pools() {
  if (!std::strcmp(cpu::kernels().name, kEmulatedKernels)) return {{.count = 1, .run = run_on_threads}};
  return {
      {.count = 1, .run = run_on_threads}, {.count = 3, .run = run_on_threads}, {.count = 16, .run = run_on_threads}};
}

struct Case {
  int64_t images, tokens, channels, prefix, k_p, k_m;
};

const Case kCases[] = {{2, 17, 24, 1, 12, 8}, {1, 65, 37, 0, 65, 33}, {3, 5, 1, 2, 4, 3},        {2, 1, 3, 1, 1, 1},
                       {2, 9, 16, 1, 1, 1},   {4, 40, 65, 1, 39, 2},  {1, 197, 96, 1, 168, 156}, {0, 8, 8, 1, 4, 3}};

// More tokens than the CUDA kernels keep in shared memory.
const Case kManyTokens = {2, 4200, 3, 1, 4190, 4150};
// More images than a block of threads sums at once.
const Case kManyImages = {70, 20, 3, 1, 14, 9};
// More channels than a warp asks for at first.
const Case kManyChannels = {2, 17, 390, 1, 12, 8};

inline std::unique_ptr<float[]> random_floats(int64_t count, unsigned seed, float low = -1, float high = 1) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(low, high);
  auto values = exact<float>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = uniform(generator);
  return values;
}

inline Tokens tokens_of(const void* data, const Case& c) {
  return {.data = data, .stride_image = c.tokens * c.channels, .stride_token = c.channels};
}

inline Vector vector_of(const void* data, const Case& c) {
  return {.data = data, .stride_image = c.tokens, .stride_token = 1};
}

// Importance of the patches that is given, not computed from attention.
inline Importance given(const float* importance, const Case& c) {
  return {.data = importance,
          .type = Type::f32,
          .heads = 1,
          .queries = 1,
          .stride_image = c.tokens - c.prefix,
          .stride_head = 0,
          .stride_query = 0,
          .stride_token = 1};
}

// Says so where the processor lacks what the test was to run on.
inline void say_what_runs() {
  const char* wanted = std::getenv("DIFFRATE_CPU_CAPABILITY");
  if (wanted && std::strcmp(wanted, cpu::kernels().name)) std::printf("this processor lacks %s\n", wanted);
}

}  // namespace diffrate::testing
