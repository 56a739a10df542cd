// The way from an operator to its kernel: run::prune_merge(x, args) and the like, one function for each line of
// common/kernels.h. It chooses between CPU and CUDA by the tensor.
#pragma once

#include "cuda/kernels.h"
#include "ops/device.h"

namespace diffrate::ops {

// Torch's thread pool, for kernels that do not know torch.
inline cpu::Threads threads() {
  return {.count = torch::stable::get_num_threads(),
          .run = [](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

template <class Args>
void run_kernel(const Tensor& tensor, const char* name, cpu::Kernel<Args> cpu::Kernels::* on_cpu,
                cuda::Kernel<Args> cuda::Kernels::* on_cuda, const Args& args) {
  if (runs_on_cpu(tensor)) {
    cpu::Kernel<Args> kernel = cpu::kernels().*on_cpu;
    DIFFRATE_CHECK(kernel != nullptr, name, " has a CUDA kernel only");
    return kernel(args, threads());
  }
  DIFFRATE_CHECK(cuda::registered_kernels != nullptr,
                 "on CUDA: diffrate_ext was built without CUDA kernels; build it where nvcc and a CUDA build of torch "
                 "are found");
  OnDevice device(tensor);
  struct Memory {  // of torch's allocator, which gives it to nobody else before the stream is done with it
    const Tensor& like;
    std::optional<Tensor> bytes;
  } memory{tensor, {}};
  auto allocate = [](void* context, int64_t bytes) {
    Memory& own = *static_cast<Memory*>(context);
    own.bytes = empty_like(own.like, {bytes}, ScalarType::Byte);
    return own.bytes->mutable_data_ptr();
  };
  const char* error =
      (cuda::registered_kernels->*on_cuda)(args, {.allocate = allocate, .context = &memory}, device.current_stream());
  DIFFRATE_CHECK(error == nullptr, "on CUDA: ", error);
}

namespace run {

#define DIFFRATE_RUN(kernel, Args)                                                    \
  inline void kernel(const Tensor& tensor, const Args& args) {                        \
    run_kernel(tensor, #kernel, &cpu::Kernels::kernel, &cuda::Kernels::kernel, args); \
  }
DIFFRATE_KERNELS(DIFFRATE_RUN, DIFFRATE_RUN)
#undef DIFFRATE_RUN

}  // namespace run
}  // namespace diffrate::ops
