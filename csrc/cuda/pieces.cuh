#pragma once
#include <stdint.h>

namespace diffrate::cuda {

// Memory, handed out piece by piece, aligned to 16 bytes. Built from nullptr it only counts.
class Pieces {
 public:
  __host__ __device__ explicit Pieces(unsigned char* base) : base_(base) {}

  template <class T>
  __host__ __device__ T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) & ~int64_t{15};
    return piece;
  }
  __host__ __device__ int64_t bytes() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

}  // namespace diffrate::cuda
