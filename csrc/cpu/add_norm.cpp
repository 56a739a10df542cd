// The sum of two tensors, and its layer normalization.
#include "cpu/dispatch.h"
#include "cpu/images.h"
#include "cpu/layer_norm.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

constexpr int64_t kRowsAtOnce = 8;  // less is not worth a thread

template <class T>
void add_and_normalize(const AddNormArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.channels;
  const T* residual = static_cast<const T*>(a.residual) + row * a.channels;
  T* sum = static_cast<T*>(a.out) + row * a.channels;
  for_vectors<Wide<T>>(a.channels, [&](int64_t c, auto load_at, auto store_at) {
    store_at(sum + c, load_at(x + c) + load_at(residual + c));
  });
  normalize_row(a.norm, sum, static_cast<T*>(a.norm.out) + row * a.channels, a.channels);
}

}  // namespace

void add_norm(const AddNormArgs& a, const Threads& threads) {
  int64_t pieces = (a.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  int64_t ranges = pieces < threads.count ? pieces : threads.count;
  dispatch(a.type, [&](auto example) {
    run(threads, ranges, [&](int64_t range) {
      for (int64_t row = a.rows * range / ranges; row < a.rows * (range + 1) / ranges; ++row)
        add_and_normalize<decltype(example)>(a, row);
    });
  });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
