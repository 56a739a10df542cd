// The differentiable discrete proxies of all blocks at once: one thread block per proxy. A keep probability is a
// running sum over candidates, so that a proxy costs K + N operations. Sums are kept in double, in a fixed order: a
// kept number is a ceiling. Equal logits give ones, so that their sums are exact.
#include "cuda/common.cuh"

namespace diffrate::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Running sums and totals over the threads of the block.
struct Block {
  double* partial;  // one for each warp

  // The sum of the values of all threads before this one; `total` becomes that of all.
  __device__ double sum_before(double value, double& total) const {
    double running = value;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      double before = __shfl_sync(kAllLanes, running, lane_id() >= offset ? lane_id() - offset : lane_id());
      if (lane_id() >= offset) running += before;
    }
    __syncthreads();
    if (lane_id() == kWarp - 1) partial[warp_id()] = running;
    __syncthreads();
    double before = 0;
    total = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp_id()) before += partial[i];
      total += partial[i];
    }
    return before + running - value;
  }

  __device__ double largest(double value) const {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      double other = __shfl_xor_sync(kAllLanes, value, offset);
      value = other > value ? other : value;
    }
    __syncthreads();
    if (lane_id() == 0) partial[warp_id()] = value;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) value = partial[i] > value ? partial[i] : value;
    return value;
  }
};

// The contiguous share of `count` things that this thread has.
struct Range {
  int64_t begin, end;
  __device__ explicit Range(int64_t count) {
    int64_t each = (count + kThreads - 1) / kThreads;
    begin = each * threadIdx.x < count ? each * threadIdx.x : count;
    end = begin + each < count ? begin + each : count;
  }
};

template <class W>
struct Proxy {
  const CompressionRateArgs& a;
  Block block;
  const W* logits;
  Range mine;  // candidates
  double top, total;

  __device__ Proxy(const CompressionRateArgs& args, Block shared)
      : a(args),
        block(shared),
        logits(static_cast<const W*>(a.logits) + blockIdx.x * a.candidates),
        mine(a.candidates) {
    double highest = -INFINITY, sum = 0;
    for (int64_t k = mine.begin; k < mine.end; ++k) highest = logits[k] > highest ? double(logits[k]) : highest;
    top = block.largest(highest);
    for (int64_t k = mine.begin; k < mine.end; ++k) sum += probability(k);
    block.sum_before(sum, total);
  }

  // Unnormalised.
  __device__ double probability(int64_t k) const { return exp(static_cast<double>(logits[k]) - top); }
  __device__ int64_t candidate(int64_t k) const { return a.patches - a.granularity * k; }
};

template <class W>
__global__ void __launch_bounds__(kThreads) compression_rate_kernel(CompressionRateArgs a) {
  Proxy<W> proxy(a, Block{Shared(shared_memory()).take<double>(kWarps)});
  double sum = 0, weighted = 0, total_weighted;
  for (int64_t k = proxy.mine.begin; k < proxy.mine.end; ++k) {
    double p = proxy.probability(k);
    sum += p;
    weighted += p * static_cast<double>(proxy.candidate(k));
  }
  proxy.block.sum_before(weighted, total_weighted);
  if (threadIdx.x == 0)
    static_cast<W*>(a.kept)[blockIdx.x] =
        static_cast<W>(ceil(total_weighted / proxy.total) + static_cast<double>(a.prefix));

  // sorted position j is kept by the candidates above j - P: candidate k is the last to keep those from c_{k+1} + P on
  double running = proxy.block.sum_before(sum, sum);
  W* keep = static_cast<W*>(a.keep_prob) + blockIdx.x * (a.patches + a.prefix);
  for (int64_t k = proxy.mine.begin; k < proxy.mine.end; ++k) {
    running += proxy.probability(k);
    int64_t first = k + 1 < a.candidates ? proxy.candidate(k + 1) + a.prefix : 0;
    for (int64_t j = first; j < proxy.candidate(k) + a.prefix; ++j) keep[j] = static_cast<W>(running / proxy.total);
  }
}

// With g_k the gradient that candidate k's probability receives, that of its logit is p_k (g_k - sum_l p_l g_l).
template <class W>
__global__ void __launch_bounds__(kThreads) compression_rate_backward_kernel(CompressionRateArgs a) {
  Proxy<W> proxy(a, Block{Shared(shared_memory()).take<double>(kWarps)});
  const W* grad_keep = static_cast<const W*>(a.grad_keep_prob) + blockIdx.x * (a.patches + a.prefix);
  double grad_kept = static_cast<const W*>(a.grad_kept)[blockIdx.x];
  W* grad = static_cast<W*>(a.grad_logits) + blockIdx.x * a.candidates;

  // candidate k keeps the positions below c_k + P; candidates are taken in ascending order of c_k, so from the last
  auto positions = [&](int64_t k, double sum) {
    int64_t first = k + 1 < a.candidates ? proxy.candidate(k + 1) + a.prefix : 0;
    for (int64_t j = first; j < proxy.candidate(k) + a.prefix; ++j) sum += static_cast<double>(grad_keep[j]);
    return sum;
  };
  double sum = 0, total;
  for (int64_t i = proxy.mine.begin; i < proxy.mine.end; ++i) sum = positions(a.candidates - 1 - i, sum);
  double start = proxy.block.sum_before(sum, total);
  auto for_candidates = [&](auto body) {
    double below = start;
    for (int64_t i = proxy.mine.begin; i < proxy.mine.end; ++i) {
      int64_t k = a.candidates - 1 - i;
      below = positions(k, below);
      body(k, proxy.probability(k) / proxy.total, below + grad_kept * static_cast<double>(proxy.candidate(k)));
    }
  };
  double part = 0, mean;
  for_candidates([&](int64_t, double p, double gradient) { part += p * gradient; });
  proxy.block.sum_before(part, mean);
  for_candidates([&](int64_t k, double p, double gradient) { grad[k] = static_cast<W>(p * (gradient - mean)); });
}

template <class Kernel>
const char* run(Kernel kernel, const CompressionRateArgs& a, void* stream) {
  Shared shared(nullptr);
  shared.take<double>(kWarps);
  return launch(kernel, a.proxies, kThreads, shared.bytes(), static_cast<Stream>(stream), a);
}

}  // namespace

const char* compression_rate(const CompressionRateArgs& a, const Scratch&, void* stream) {
  return a.type == Type::f64 ? run(compression_rate_kernel<double>, a, stream)
                             : run(compression_rate_kernel<float>, a, stream);
}

const char* compression_rate_backward(const CompressionRateArgs& a, const Scratch&, void* stream) {
  return a.type == Type::f64 ? run(compression_rate_backward_kernel<double>, a, stream)
                             : run(compression_rate_backward_kernel<float>, a, stream);
}

}  // namespace diffrate::cuda
