// Vectors of the width this file is compiled for, written once with the compilers' vector extension (GCC and Clang, x86
// and Arm). Each kernel source is compiled once per instruction set, with DIFFRATE_SIMD naming the namespace.
//
// Everything here has internal linkage or lives in that namespace: a weak symbol compiled for AVX-512 could otherwise
// be picked by the linker for code that runs on every processor (CTest `no_shared_symbols` checks it).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/numeric.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define DIFFRATE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DIFFRATE_VECTOR_BYTES 32
#else
#define DIFFRATE_VECTOR_BYTES 16
#endif

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that sums are kept in, and that importances and sizes have.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

template <class W>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(DIFFRATE_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(DIFFRATE_VECTOR_BYTES)));
  typedef uint16_t half_bits __attribute__((vector_size(DIFFRATE_VECTOR_BYTES / 2)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(DIFFRATE_VECTOR_BYTES)));
};

template <class W>
using Vec = typename VectorOf<W>::type;
using VecBits = VectorOf<float>::bits;
using HalfBits = VectorOf<float>::half_bits;

template <class W>
constexpr int64_t kLanes = DIFFRATE_VECTOR_BYTES / sizeof(W);

template <class V>
inline V read(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

inline Vec<float> select(VecBits mask, Vec<float> yes, Vec<float> no) {
  return bits_as<Vec<float>>((bits_as<VecBits>(yes) & mask) | (bits_as<VecBits>(no) & ~mask));
}

// --- float16 and bfloat16

inline Vec<float> widen(HalfBits bits, BFloat16) {
  return bits_as<Vec<float>>(__builtin_convertvector(bits, VecBits) << 16);
}

inline HalfBits narrow(Vec<float> value, BFloat16) {
  VecBits bits = bits_as<VecBits>(value);
  VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  VecBits nan = (VecBits)(value != value);
  return __builtin_convertvector((rounded & ~nan) | ((VecBits{} + 0x7fc0) & nan), HalfBits);
}

#if defined(__F16C__) && defined(__AVX512F__)
inline Vec<float> widen(HalfBits bits, Half) { return (Vec<float>)_mm512_cvtph_ps(bits_as<__m256i>(bits)); }
inline HalfBits narrow(Vec<float> value, Half) {
  return bits_as<HalfBits>(_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__) && defined(__AVX2__)
inline Vec<float> widen(HalfBits bits, Half) { return (Vec<float>)_mm256_cvtph_ps(bits_as<__m128i>(bits)); }
inline HalfBits narrow(Vec<float> value, Half) {
  return bits_as<HalfBits>(_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec<float> widen(HalfBits half, Half) {
  VecBits bits = __builtin_convertvector(half, VecBits);
  VecBits magnitude = bits & 0x7fff;
  // shifted into a float's fields the exponent is 112 too small; multiplying also normalises subnormal numbers
  Vec<float> finite = bits_as<Vec<float>>(magnitude << 13) * bits_as<float>(uint32_t{0x77800000});
  VecBits special = (VecBits)(magnitude >= 0x7c00);
  VecBits result = (bits_as<VecBits>(finite) & ~special) | ((magnitude << 13 | 0x7f800000) & special);
  return bits_as<Vec<float>>(result | (bits & 0x8000) << 16);
}

inline HalfBits narrow(Vec<float> value, Half) {
  VecBits bits = bits_as<VecBits>(value);
  VecBits sign = bits & 0x80000000u;
  VecBits magnitude = bits ^ sign;
  // normal numbers: re-bias the exponent by 15 - 127 and round to nearest, ties to even
  VecBits normal = (magnitude + (0xc8000000u + 0xfffu) + ((magnitude >> 13) & 1)) >> 13;
  // numbers below 2^-14: let the float adder round at the place of a subnormal's last bit
  const uint32_t magic = ((127 - 15) + (23 - 10) + 1) << 23;
  VecBits small = bits_as<VecBits>(bits_as<Vec<float>>(magnitude) + bits_as<float>(magic)) - magic;
  VecBits is_small = (VecBits)(magnitude < 0x38800000u);
  VecBits is_large = (VecBits)(magnitude >= 0x47800000u);
  VecBits is_nan = (VecBits)(magnitude > 0x7f800000u);
  VecBits result = (small & is_small) | (normal & ~is_small);
  result = (result & ~is_large) | (is_large & (VecBits{} + 0x7c00)) | (is_nan & (VecBits{} + 0x0200));
  return __builtin_convertvector(result | sign >> 16, HalfBits);
}
#endif

// The same number in all lanes: taking zero off leaves any number as it is, so that nothing is computed.
inline Vec<float> broadcast(float value) { return value - Vec<float>{}; }
inline Vec<double> broadcast(double value) { return value - Vec<double>{}; }

// std::fill would be a shared symbol
template <class T>
inline void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// --- loads, stores, sums

inline Vec<float> load(const float* from) { return read<Vec<float>>(from); }
inline Vec<double> load(const double* from) { return read<Vec<double>>(from); }
inline Vec<float> load(const Half* from) { return widen(read<HalfBits>(from), Half{}); }
inline Vec<float> load(const BFloat16* from) { return widen(read<HalfBits>(from), BFloat16{}); }

inline void store(float* to, Vec<float> value) { std::memcpy(to, &value, sizeof(value)); }
inline void store(double* to, Vec<double> value) { std::memcpy(to, &value, sizeof(value)); }
template <class T>
inline void store(T* to, Vec<float> value) {
  HalfBits bits = narrow(value, T{});
  std::memcpy(to, &bits, sizeof(bits));
}

// What is left of numbers that are stored as T.
template <class T>
inline Vec<Wide<T>> rounded(Vec<Wide<T>> value) {
  if constexpr (sizeof(T) == sizeof(Wide<T>)) return value;
  T stored[kLanes<Wide<T>>];
  store(stored, value);
  return load(stored);
}

// The last, incomplete vector of a row: missing lanes are zero and are not touched in memory.
template <class T>
inline Vec<Wide<T>> load_some(const T* from, int64_t count) {
  T buffer[kLanes<Wide<T>>] = {};
  std::memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_some(T* to, Vec<Wide<T>> value, int64_t count) {
  T buffer[kLanes<Wide<T>>];
  store(buffer, value);
  std::memcpy(to, buffer, count * sizeof(T));
}

// Calls body(channel, load, store) for each vector of a row; the loader and the storer know about the incomplete one.
template <class W, class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t channels, Body body) {
  constexpr int64_t lanes = kLanes<W>;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes)
    body(c, [](auto* from) { return load(from); }, [](auto* to, auto value) { store(to, value); });
  if (int64_t rest = channels - c; rest > 0)
    body(
        c, [rest](auto* from) { return load_some(from, rest); },
        [rest](auto* to, auto value) { store_some(to, value, rest); });
}

// a * b + c in one rounding where the processor can, and always in the same way. Of `a * b + c` as it stands the
// compiler decides for each place anew, and numbers that must be equal bit by bit may come out different.
#if defined(__AVX512F__)
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;  // there is no other way: x86-64 has no fused one
}
#endif

typedef float Quad __attribute__((vector_size(16)));

// Adds up the vector's quarters, halves or nothing, whichever leaves four lanes.
template <class V>
inline Quad fold(V value) {
  if constexpr (sizeof(V) == sizeof(Quad)) {
    return bits_as<Quad>(value);
  } else {
    typedef float Half __attribute__((vector_size(sizeof(V) / 2)));
    struct {
      Half low, high;
    } halves;
    std::memcpy(&halves, &value, sizeof(value));
    return fold(halves.low + halves.high);
  }
}

// The elements a, b, c, d of two quads laid end to end.
template <int a, int b, int c, int d>
inline Quad pick(Quad first, Quad second) {
#if defined(__clang__)
  return __builtin_shufflevector(first, second, a, b, c, d);
#else
  typedef int32_t Index __attribute__((vector_size(16)));
  return __builtin_shuffle(first, second, Index{a, b, c, d});
#endif
}

// The sums of four vectors at once, which is cheaper than four times one.
inline Quad sum_four(const Vec<float>* values) {
  Quad a = fold(values[0]), b = fold(values[1]), c = fold(values[2]), d = fold(values[3]);
  Quad ab = pick<0, 4, 1, 5>(a, b) + pick<2, 6, 3, 7>(a, b);  // a02 b02 a13 b13
  Quad cd = pick<0, 4, 1, 5>(c, d) + pick<2, 6, 3, 7>(c, d);
  return pick<0, 1, 4, 5>(ab, cd) + pick<2, 3, 6, 7>(ab, cd);
}

inline float sum(Vec<float> value) {
  Quad quad = fold(value);
  return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

inline double sum(Vec<double> value) {
  double total = 0;
  for (int64_t i = 0; i < kLanes<double>; ++i) total += value[i];
  return total;
}

typedef double DoubleQuad __attribute__((vector_size(32)));

inline __attribute__((always_inline)) DoubleQuad sum_four(const Vec<double>* values) {
  return DoubleQuad{sum(values[0]), sum(values[1]), sum(values[2]), sum(values[3])};
}

inline float to_wide(float value) { return value; }
inline double to_wide(double value) { return value; }
template <class T>
inline float to_wide(T value) {
  return load_some(&value, 1)[0];
}

// exp of values <= 0 (softmax after its maximum is taken off), within 2 ulp; results below 2^-126 become 2^-126.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> lowest = Vec<float>{} - 87.33654f;
  x = select((VecBits)(x < lowest), lowest, x);  // keeps NaN
  const float magic = 12582912.0f;               // 1.5 * 2^23: adding it rounds to an integer
  Vec<float> shifted = x * 1.44269504f + magic;
  Vec<float> n = shifted - magic;
  Vec<float> r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  Vec<float> p = r * 1.9875691e-4f + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  VecBits exponent = (bits_as<VecBits>(shifted) - bits_as<uint32_t>(magic)) << 23;
  return bits_as<Vec<float>>(bits_as<VecBits>(p) + exponent);
}

inline Vec<double> exp_nonpositive(Vec<double> x) {  // float64 serves gradient checks, not speed
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
