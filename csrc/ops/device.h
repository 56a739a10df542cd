// Where an operator runs: on the CPU, or on the tensors' CUDA device and current stream.
//
// Tests of the CUDA kernels without a GPU put csrc/testing/overrides first in the include path, which has another
// ops/device.h.
#pragma once

#include "ops/common.h"
#include "torch/csrc/stable/accelerator.h"

// Absent in a CPU-only torch: a hard reference would keep the whole library from loading there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace diffrate::ops {

inline bool runs_on_cpu(const Tensor& tensor) { return !tensor.is_cuda(); }

// Makes a tensor's device the current one, as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  void* current_stream() const {
    DIFFRATE_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA support");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace diffrate::ops
