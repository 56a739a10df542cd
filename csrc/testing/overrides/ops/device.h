// In place of csrc/ops/device.h: operators on CPU tensors run the CUDA kernels on the emulated device.
#pragma once

#include "ops/common.h"

namespace diffrate::ops {

inline bool runs_on_cpu(const Tensor& tensor) {
  DIFFRATE_CHECK(tensor.is_cpu(), "this build, with emulated CUDA kernels, takes CPU tensors only");
  return false;
}

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  void* current_stream() const { return nullptr; }
};

}  // namespace diffrate::ops
