// Where an operator runs: the CPU kernels, or the CUDA kernels on the tensors' device and current stream.
#pragma once

#include "ops/common.h"
#include "torch/csrc/stable/accelerator.h"

// Absent in a CPU-only torch: a hard reference would keep the whole library from loading there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace diffrate::ops {

inline void* current_stream(const Tensor& tensor) {
  DIFFRATE_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// Runs `on_cpu(kernels, threads)` or `on_cuda(stream)`, whichever fits the tensor. `on_cuda` returns nullptr, or what
// went wrong with the launch. Emulated CUDA kernels (csrc/emulation) run on CPU tensors.
template <class OnCpu, class OnCuda>
void run_on_device(const Tensor& tensor, [[maybe_unused]] OnCpu on_cpu, OnCuda on_cuda) {
#if defined(DIFFRATE_EMULATED)
  DIFFRATE_CHECK(tensor.is_cpu(), "this build, with emulated CUDA kernels, takes CPU tensors only");
  const char* error = on_cuda(nullptr);
#else
  if (!tensor.is_cuda()) return on_cpu(cpu::kernels(), threads());
  torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  const char* error = on_cuda(current_stream(tensor));
#endif
  DIFFRATE_CHECK(error == nullptr, "on CUDA: ", error);
}

}  // namespace diffrate::ops
