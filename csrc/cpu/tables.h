// What the kernel sources of one instruction set declare to each other.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace diffrate::cpu::DIFFRATE_SIMD {

void sort_tokens(const SortArgs&, const Threads&);
void prune_merge(const PruneMergeArgs&, const Threads&);
void merge_reduce(const MergeReduceArgs&, const Threads&);
void merge_reduce_backward(const MergeReduceArgs&, const Threads&);
void class_attention(const AttentionArgs&, const Threads&);
void received_attention(const AttentionArgs&, const Threads&);
void masked_attention(const MaskedAttentionArgs&, const Threads&);
void masked_attention_backward(const MaskedAttentionArgs&, const Threads&);
void compression_rate(const CompressionRateArgs&, const Threads&);
void compression_rate_backward(const CompressionRateArgs&, const Threads&);
void masked_prune_merge(const MaskedPruneMergeArgs&, const Threads&);

namespace {

// Calls body(T{}) with the C++ type of a dtype.
template <class Body>
void dispatch(Type type, Body body) {
  switch (type) {
    case Type::f32: return body(float{});
    case Type::f64: return body(double{});
    case Type::f16: return body(Half{});
    case Type::bf16: return body(BFloat16{});
  }
}

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
