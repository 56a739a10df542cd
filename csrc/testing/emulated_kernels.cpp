// The CUDA kernels, emulated, in place of the CPU kernels: what test_kernels.cpp then tests.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace diffrate::cpu {
namespace {

void expect(const char* error) {
  if (error == nullptr) return;
  std::printf("FAILED: launch: %s\n", error);
  std::exit(1);
}

template <class Args, const char* (*kKernel)(const Args&, void*)>
void run(const Args& args, const Threads&) {
  expect(kKernel(args, nullptr));
}

template <class Args, const char* (*kKernel)(const Args&, void*, void*), int64_t (*kBytes)(const Args&)>
void run_with_scratch(const Args& args, const Threads&) {
  // exactly as long as asked for, so that a sanitizer sees what lies beyond
  auto scratch = std::make_unique<unsigned char[]>(static_cast<size_t>(kBytes(args)));
  expect(kKernel(args, scratch.get(), nullptr));
}

const char* masked_prune_merge_of_numbers(const MaskedPruneMergeArgs& args, void* scratch, void* stream) {
  float kept_p = static_cast<float>(args.k_p), kept_m = static_cast<float>(args.k_m);
  MaskedPruneMergeArgs with_pointers = args;
  with_pointers.kept_p_on_device = &kept_p;
  with_pointers.kept_m_on_device = &kept_m;
  return cuda::masked_prune_merge(with_pointers, scratch, stream);
}

const Kernels kEmulated = {
    "emulated CUDA kernels",
    run<SortArgs, cuda::sort_tokens>,
    run_with_scratch<PruneMergeArgs, cuda::prune_merge, cuda::prune_merge_scratch_bytes>,
    run<MergeReduceArgs, cuda::merge_reduce>,
    run<MergeReduceArgs, cuda::merge_reduce_backward>,
    run_with_scratch<AttentionArgs, cuda::class_attention, cuda::class_attention_scratch_bytes>,
    run_with_scratch<AttentionArgs, cuda::received_attention, cuda::received_attention_scratch_bytes>,
    run_with_scratch<MaskedAttentionArgs, cuda::masked_attention, cuda::masked_attention_scratch_bytes>,
    run_with_scratch<MaskedAttentionArgs, cuda::masked_attention_backward,
                     cuda::masked_attention_backward_scratch_bytes>,
    run<CompressionRateArgs, cuda::compression_rate>,
    run<CompressionRateArgs, cuda::compression_rate_backward>,
    run_with_scratch<MaskedPruneMergeArgs, masked_prune_merge_of_numbers, cuda::masked_prune_merge_scratch_bytes>,
};

}  // namespace

const Kernels& kernels() { return kEmulated; }

}  // namespace diffrate::cpu
