// What all tests here share: counting what holds, memory without slack, threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

namespace diffrate::testing {

inline int passed = 0, failed = 0;

inline void check(bool good, const std::string& what) {
  ++(good ? passed : failed);
  if (!good) std::printf("FAILED: %s\n", what.c_str());
}

// For main: what to print at the end, and the exit status.
inline int report(const char* what) {
  std::printf("%s: %d passed, %d failed\n", what, passed, failed);
  return failed != 0;
}

// Memory exactly as long as it must be, for the sanitizers: a vector may have spare capacity.
template <class T>
std::unique_ptr<T[]> exact(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}
template <class T>
std::unique_ptr<T[]> exact(int64_t count, T fill) {
  auto memory = exact<T>(count);
  std::fill(memory.get(), memory.get() + count, fill);
  return memory;
}

}  // namespace diffrate::testing
