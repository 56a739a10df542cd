// The differentiable discrete proxies of all blocks at once. A keep probability is a running sum over candidates, so
// that a proxy costs K + N operations instead of K * N. Sums are kept in double: a kept number is a ceiling.
#include "cpu/dispatch.h"
#include "cpu/images.h"
#include "cpu/memory.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

template <class W>
struct CompressionRate {
  const CompressionRateArgs& a;

  int64_t candidate(int64_t k) const { return a.patches - a.granularity * k; }

  // Unnormalised probabilities of one proxy. Returns their sum. Equal logits give ones, so that sums are exact.
  double probabilities(int64_t proxy, double* p) const {
    const W* logits = static_cast<const W*>(a.logits) + proxy * a.candidates;
    W top = logits[0];
    for (int64_t k = 1; k < a.candidates; ++k) top = logits[k] > top ? logits[k] : top;
    double total = 0;
    for (int64_t k = 0; k < a.candidates; ++k) {
      p[k] = __builtin_exp(static_cast<double>(logits[k]) - static_cast<double>(top));
      total += p[k];
    }
    return total;
  }

  void forward(int64_t proxy, double* p) const {
    double total = probabilities(proxy, p), weighted = 0;
    for (int64_t k = 0; k < a.candidates; ++k) weighted += p[k] * static_cast<double>(candidate(k));
    static_cast<W*>(a.kept)[proxy] = static_cast<W>(__builtin_ceil(weighted / total) + static_cast<double>(a.prefix));

    // position j is kept by the candidates above j - P; they fall with k
    W* keep = static_cast<W*>(a.keep_prob) + proxy * (a.patches + a.prefix);
    double sum = 0;
    int64_t k = 0;
    for (int64_t j = a.patches + a.prefix - 1; j >= 0; --j) {
      for (; k < a.candidates && candidate(k) > j - a.prefix; ++k) sum += p[k];
      keep[j] = static_cast<W>(sum / total);
    }
  }

  void backward(int64_t proxy, double* p, double* gradient) const {
    double total = probabilities(proxy, p);
    const W* grad_keep = static_cast<const W*>(a.grad_keep_prob) + proxy * (a.patches + a.prefix);
    double grad_kept = static_cast<const W*>(a.grad_kept)[proxy];
    W* grad = static_cast<W*>(a.grad_logits) + proxy * a.candidates;
    // the gradient of p_k: candidate k keeps the positions below c_k + P
    double below = 0, mean = 0;
    int64_t j = 0;
    for (int64_t k = a.candidates - 1; k >= 0; --k) {
      for (; j < candidate(k) + a.prefix; ++j) below += static_cast<double>(grad_keep[j]);
      gradient[k] = below + grad_kept * static_cast<double>(candidate(k));
      mean += p[k] / total * gradient[k];
    }
    for (int64_t k = 0; k < a.candidates; ++k) grad[k] = static_cast<W>(p[k] / total * (gradient[k] - mean));
  }
};

template <class Step>
void for_proxies(const CompressionRateArgs& a, Step step) {
  Memory memory(Arena::bytes<double>(2 * a.candidates));
  double* scratch = reinterpret_cast<double*>(memory.get());
  auto all = [&](auto example) {
    CompressionRate<decltype(example)> op{a};
    for (int64_t proxy = 0; proxy < a.proxies; ++proxy) step(op, proxy, scratch);
  };
  if (a.type == Type::f64)
    all(double{});
  else
    all(float{});
}

}  // namespace

// A few thousand numbers: not worth a second thread.
void compression_rate(const CompressionRateArgs& a, const Threads&) {
  for_proxies(a, [](const auto& op, int64_t proxy, double* scratch) { op.forward(proxy, scratch); });
}

void compression_rate_backward(const CompressionRateArgs& a, const Threads&) {
  for_proxies(
      a, [&](const auto& op, int64_t proxy, double* scratch) { op.backward(proxy, scratch, scratch + a.candidates); });
}

}  // namespace diffrate::cpu::DIFFRATE_SIMD
