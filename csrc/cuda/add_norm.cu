// The sum of two tensors, and its layer normalization.
#include "cuda/layer_norm.cuh"

namespace diffrate::cuda {

const char* add_norm(const AddNormArgs& a, const Scratch&, void* stream) {
  return dispatch(a.type, [&](auto example) {
    using T = decltype(example);
    NormRows<T> rows{
        .x = static_cast<const T*>(a.x), .residual = static_cast<const T*>(a.residual), .sum = static_cast<T*>(a.out)};
    return normalize_rows<T, true>(a.norm, rows, a.rows, a.channels, static_cast<Stream>(stream));
  });
}

}  // namespace diffrate::cuda
