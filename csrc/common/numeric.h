// Number formats and scalar rules that CPU and CUDA kernels share.
#pragma once

#include <cstdint>

// Always inlined: these compile for several instruction sets, which must not share one copy.
#if defined(__CUDACC__)
#define DIFFRATE_INLINE static __host__ __device__ __forceinline__
#else
#define DIFFRATE_INLINE static inline __attribute__((always_inline))
#endif

namespace diffrate {

// A cosine's denominator is at least this, as in torch.nn.functional.normalize.
constexpr double kNormEpsilon = 1e-12;
// Cosine-weighted merging can drive a size to zero or below. Clamped to the smallest normal float32 its logarithm stays
// finite.
constexpr double kTinySize = 1.17549435082228750797e-38;
// Of the masked softmax: keeps a row of which nothing is left from dividing by zero.
constexpr double kMaskedEpsilon = 1e-6;

template <class To, class From>
DIFFRATE_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(static_cast<void*>(&result), &value, sizeof(To));  // void: To may have private members
  return result;
}

// An unsigned key whose ascending order is the sort order of importances: descending values, NaN last, -0 equal to +0.
DIFFRATE_INLINE uint32_t descending_key(float value) {
  if (value != value) return UINT32_MAX;
  uint32_t bits = bits_as<uint32_t>(value + 0.0f);  // -0 becomes +0
  uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ~ascending;
}

// The value of a key. Of NaN it is any NaN.
DIFFRATE_INLINE float descending_value(uint32_t key) {
  uint32_t ascending = ~key;
  return bits_as<float>(ascending & 0x80000000u ? ascending ^ 0x80000000u : ~ascending);
}

DIFFRATE_INLINE uint64_t descending_key(double value) {
  if (value != value) return UINT64_MAX;
  uint64_t bits = bits_as<uint64_t>(value + 0.0);
  uint64_t ascending = bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
  return ~ascending;
}

}  // namespace diffrate
