// The table of entry points of one instruction set.
#include "cpu/tables.h"

#define DIFFRATE_STRING_OF(x) #x
#define DIFFRATE_STRING(x) DIFFRATE_STRING_OF(x)

namespace diffrate::cpu::DIFFRATE_SIMD {

extern const Kernels table;
const Kernels table = {
    DIFFRATE_STRING(DIFFRATE_SIMD),
    sort_tokens,
    prune_merge,
    merge_reduce,
    merge_reduce_backward,
    class_attention,
    received_attention,
    masked_attention,
    masked_attention_backward,
    compression_rate,
    compression_rate_backward,
    masked_prune_merge,
};

}  // namespace diffrate::cpu::DIFFRATE_SIMD
