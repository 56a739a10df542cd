// Tests of what the kernels are made of: number formats, exponentials, and which tokens kept numbers keep.
#include <cmath>
#include <limits>

#include "common/kept_numbers.h"
#include "testing/checks.h"
#define DIFFRATE_SIMD plain
#include "cpu/simd.h"

namespace diffrate::testing {
namespace {

namespace simd = diffrate::cpu::plain;

// float16 and bfloat16 as every value's round trip and as rounding to nearest even.
template <class T>
void test_half_format(T, const char* name) {
  bool round_trip = true, nearest = true;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    T value{static_cast<uint16_t>(bits)};
    float wide = simd::to_wide(value);
    T back;
    simd::store_some(&back, wide - simd::Vec<float>{}, 1);  // adding to zero would lose the sign of -0
    round_trip = round_trip && (wide != wide ? simd::to_wide(back) != simd::to_wide(back) : back.bits == value.bits);
    T next{static_cast<uint16_t>(bits + 1)};
    float above = simd::to_wide(next);
    if (!std::isfinite(wide) || !std::isfinite(above) || ((bits + 1) & 0x7fff) == 0) continue;
    T middle;
    simd::store_some(&middle, simd::Vec<float>{} + (wide + (above - wide) / 2), 1);
    nearest = nearest && middle.bits == ((bits & 1) ? next.bits : value.bits);
  }
  check(round_trip, name);
  check(nearest, name);
}

void test_exp() {
  double worst = 0;
  for (float x = 0; x > -87; x -= 0.01f) {
    double expected = std::exp(double(x));
    worst = std::fmax(worst, std::abs(simd::exp_nonpositive(simd::Vec<float>{} + x)[0] - expected) / expected);
  }
  check(worst < 3e-7, "exp_nonpositive");
  check(simd::exp_nonpositive(simd::Vec<float>{} - INFINITY)[0] < 1.2e-38f, "exp_nonpositive of -inf");
}

template <class W>
void test_whole_numbers(const std::string& name) {
  const W infinity = std::numeric_limits<W>::infinity(), nan = std::numeric_limits<W>::quiet_NaN();
  const W below_half = std::nextafter(W(0.5), W(0)), above_half = std::nextafter(W(0.5), W(1));
  struct {
    W number;
    int64_t expected;
  } const cases[] = {{0, 0},          {W(0.5), 1},  {below_half, 0},  // to which a half cannot be added exactly
                     {above_half, 1}, {W(1.5), 2},  {W(2.5), 3},     {W(2.25), 2},   {W(2.75), 3},
                     {W(99.5), 100},  {100, 100},   {W(100.5), 100}, {W(1e30), 100}, {infinity, 100},
                     {W(-0.0), 0},    {W(-0.5), 0}, {W(-7), 0},      {-infinity, 0}, {nan, 0}};
  for (const auto& [number, expected] : cases)
    check(whole_number_of_tokens(number, 100) == expected, name + ": whole number of " + std::to_string(number));
  const int64_t odd = (int64_t{1} << std::numeric_limits<W>::digits) - 1;  // where adding a half would round
  check(whole_number_of_tokens(static_cast<W>(odd), odd + 2) == odd, name + ": the largest odd number");
}

// Whatever the numbers: every position is in bounds, and what merges has something to merge into.
void test_kept_positions() {
  const int64_t tokens = 6;
  for (int64_t prefix = 0; prefix <= tokens; ++prefix)
    for (int alive = 0; alive <= 6; ++alive)
      for (int p = -1; p <= 7; ++p)
        for (int m = -1; m <= 7; ++m) {
          KeptPositions at = kept_positions<float>(alive, p, m, tokens, prefix);
          std::string name = "kept positions for P = " + std::to_string(prefix) + ", alive " + std::to_string(alive) +
                             ", kept_p " + std::to_string(p) + ", kept_m " + std::to_string(m);
          check(at.last == alive && at.middle >= prefix && at.middle <= tokens, name + ": in bounds");
          check(at.kept <= at.middle && (at.kept == at.middle || at.kept > prefix), name + ": a destination");
          bool sensible = p >= 0 && p <= tokens && m >= 0 && std::min(p, alive) >= prefix &&
                          (m >= std::min(p, alive) || m > prefix);
          if (sensible)
            check(at.middle == std::min(p, alive) && at.kept == std::min<int64_t>(m, at.middle), name + ": as asked");
        }
}

}  // namespace
}  // namespace diffrate::testing

int main() {
  using namespace diffrate::testing;
  test_half_format(simd::Half{}, "float16: round trip, rounding to nearest even");
  test_half_format(simd::BFloat16{}, "bfloat16: round trip, rounding to nearest even");
  test_exp();
  test_whole_numbers<float>("float");
  test_whole_numbers<double>("double");
  test_kept_positions();
  return report("numbers");
}
