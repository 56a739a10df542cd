// Memory for intermediate results.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

// Scratch memory, in 64-byte aligned pieces.
class Arena {
 public:
  explicit Arena(char* memory) : next_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return piece;
  }

  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* next_;
};

class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(static_cast<char*>(std::aligned_alloc(64, bytes > 0 ? bytes : 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* get() const { return data_; }

 private:
  char* data_;
};

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
