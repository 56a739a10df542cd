// Test of the CUDA kernel that normalises rows by itself, on the emulated device: values against plain loops in double,
// in several orders of threads.
#include <cmath>
#include <cstring>

#include "cuda/layer_norm.cuh"
#include "testing/emulation_cases.h"

namespace diffrate::cuda {
namespace {

using testing::exact;

template <class T>
constexpr double kRounding = sizeof(T) == 8   ? 1e-12
                             : sizeof(T) == 4 ? 2e-6
                                              : 1e-2;

template <class T>
std::unique_ptr<T[]> values(int64_t count, double offset, int64_t step) {
  auto result = exact<T>(count);
  for (int64_t i = 0; i < count; ++i)
    result[i] = from_wide<T>(static_cast<Wide<T>>(offset + double(i * step % 251) / 64));
  return result;
}

// Rows far from zero: of the squares alone nothing would be left. `shift` elements lie before the weight.
template <class T>
bool rows_are_normalized(int64_t count, int64_t channels, int64_t shift, bool with_bias) {
  auto rows = values<T>(count * channels, sizeof(T) == 2 ? 10 : 1000, 89);
  auto weight = values<T>(channels + shift, 1, 17), bias = values<T>(channels, -2, 31);
  auto out = exact<T>(count * channels, not_a_number<T>());
  LayerNorm norm{
      .weight = weight.get() + shift, .bias = with_bias ? bias.get() : nullptr, .eps = 1e-6, .out = out.get()};
  if (normalize_rows<T, false>(norm, {rows.get()}, count, channels, Stream{}) != nullptr) return false;
  bool right = true;
  for (int64_t row = 0; row < count; ++row) {
    auto at = [&](const T* data, int64_t c) { return double(to_wide(data[row * channels + c])); };
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < channels; ++c) mean += at(rows.get(), c) / double(channels);
    for (int64_t c = 0; c < channels; ++c) variance += std::pow(at(rows.get(), c) - mean, 2) / double(channels);
    for (int64_t c = 0; c < channels; ++c) {
      double expected =
          (at(rows.get(), c) - mean) / std::sqrt(variance + norm.eps) * double(to_wide(weight[shift + c]));
      if (with_bias) expected += double(to_wide(bias[c]));
      right = right && std::abs(at(out.get(), c) - expected) <= kRounding<T> * 10 * (1 + std::abs(expected));
    }
  }
  return right;
}

// The sum is written, and what is normalised is the sum as it was rounded.
template <class T>
bool sums_are_normalized(int64_t count, int64_t channels, int64_t shift) {
  auto x = values<T>(count * channels + shift, 3, 89), residual = values<T>(count * channels, -7, 41);
  auto sum = exact<T>(count * channels, not_a_number<T>());
  auto out = exact<T>(count * channels, not_a_number<T>()), expected = exact<T>(count * channels);
  auto weight = values<T>(channels, 1, 17), bias = values<T>(channels, -2, 31);
  LayerNorm norm{.weight = weight.get(), .bias = bias.get(), .eps = 1e-6, .out = out.get()};
  NormRows<T> rows{.x = x.get() + shift, .residual = residual.get(), .sum = sum.get()};
  if (normalize_rows<T, true>(norm, rows, count, channels, Stream{}) != nullptr) return false;
  bool right = true;
  for (int64_t i = 0; i < count * channels; ++i) {
    T added = from_wide<T>(to_wide(x[shift + i]) + to_wide(residual[i]));
    right = right && !std::memcmp(&added, &sum[i], sizeof(T));
  }
  norm.out = expected.get();
  if (normalize_rows<T, false>(norm, {sum.get()}, count, channels, Stream{}) != nullptr) return false;
  for (int64_t i = 0; i < count * channels; ++i) {
    double should = to_wide(expected[i]);
    right = right && std::abs(to_wide(out[i]) - should) <= kRounding<T> * (1 + std::abs(should));
  }
  return right;
}

// Of constant rows the bias is left, exactly: whatever rounding left of the mean must not be blown up.
template <class T>
bool constant_rows_become_the_bias(int64_t channels) {
  auto rows = exact<T>(channels, from_wide<T>(static_cast<Wide<T>>(1000.3)));
  auto weight = values<T>(channels, 1, 17), bias = values<T>(channels, -2, 31);
  auto out = exact<T>(channels, not_a_number<T>());
  LayerNorm norm{.weight = weight.get(), .bias = bias.get(), .eps = 1e-6, .out = out.get()};
  bool right = normalize_rows<T, false>(norm, {rows.get()}, 1, channels, Stream{}) == nullptr;
  for (int64_t c = 0; c < channels; ++c)
    right = right && std::abs(double(to_wide(out[c])) - double(to_wide(bias[c]))) <= kRounding<T>;
  return right;
}

template <class T>
void test_rows(const std::string& type) {
  for (int64_t channels : {1, 8, 37, 384, 1280, 1288, 1290})
    for (int64_t count : {0, 1, 13}) {
      std::string what = type + ", " + std::to_string(count) + " rows of " + std::to_string(channels);
      in_all_orders(what, [=] { return rows_are_normalized<T>(count, channels, 0, true); });
      check(rows_are_normalized<T>(count, channels, 0, false), what + " without a bias");
      check(rows_are_normalized<T>(count, channels, 1, true), what + " with a weight that is not aligned");
      in_all_orders(what + ", added", [=] { return sums_are_normalized<T>(count, channels, 0); });
      check(sums_are_normalized<T>(count, channels, 1), what + ", added, not aligned");
    }
  for (int64_t channels : {384, 768, 1290})
    check(constant_rows_become_the_bias<T>(channels), type + ", constant rows of " + std::to_string(channels));
  check(rows_are_normalized<T>(1300, 16, 0, true), type + ", more rows than warps");
  check(sums_are_normalized<T>(1300, 16, 0), type + ", more sums than warps");
}

}  // namespace
}  // namespace diffrate::cuda

int main() {
  diffrate::cuda::test_rows<float>("float32");
  diffrate::cuda::test_rows<double>("float64");
  diffrate::cuda::test_rows<__half>("float16");
  diffrate::cuda::test_rows<__nv_bfloat16>("bfloat16");
  return diffrate::testing::report("CUDA layer normalization");
}
