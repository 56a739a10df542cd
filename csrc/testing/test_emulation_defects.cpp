// Tests of the emulated device (csrc/testing/emulation/): each planted defect is found. Kernels that must stop the
// program run in a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>

#include "testing/emulation/sanitizer.h"
#include "testing/emulation_cases.h"

namespace diffrate::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Expects that `body` stops the program with `message` on stderr. What follows one block's defect is of no interest.
template <class Body>
void expect_abort(const std::string& what, const std::string& message, Body body) {
  int pipe_ends[2];
  if (pipe(pipe_ends) != 0) std::abort();
  std::fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    dup2(pipe_ends[1], STDERR_FILENO);
    close(pipe_ends[0]);
    body();
    _exit(0);
  }
  close(pipe_ends[1]);
  std::string output;
  char buffer[4096];
  for (ssize_t n; (n = read(pipe_ends[0], buffer, sizeof buffer)) > 0;) output.append(buffer, n);
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  bool died = !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  bool said = output.find(message) != std::string::npos;
  check(died && said, what + (died ? ": another message: " + output : ": not found"));
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void exited_block_kernel() {
  if (blockIdx.x != 1) cluster_barrier();
}
__global__ void divergent_cluster_barrier_kernel() {
  if (threadIdx.x != 7) cluster_barrier();
}
__global__ void late_write_kernel() {
  int* gift = Shared(shared_memory()).take<int>(1);
  cluster_barrier();
  int* other = of_block(gift, 1 - static_cast<int>(blockIdx.x));
  cluster_barrier();
  *other = 1;
}
__global__ void outside_cluster_kernel() {
  int* gift = Shared(shared_memory()).take<int>(1);
  cluster_barrier();
  *of_block(gift, 2) = 1;
}
__global__ void misaligned_prefetch_kernel(const float* x) { prefetch_l2(x, 4); }
__global__ void barrier_and_shuffle_kernel(int* out) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    *out = __shfl_sync(kAllLanes, 1, 0);
  }
}
__global__ void exited_lane_kernel(int* out) {
  if (threadIdx.x % 32 < 16) *out = __shfl_sync(kAllLanes, 1, 0);
}
__global__ void missing_lane_kernel() { __syncwarp(); }  // in a warp that is not full
__global__ void two_masks_kernel(unsigned* out) { *out = __ballot_sync(threadIdx.x < 16 ? kAllLanes : 0xffff0000u, 1); }
__global__ void own_mask_kernel(unsigned* out) { *out = __ballot_sync(0xffffu, 1); }
__global__ void outside_mask_kernel(int* out) {
  if (threadIdx.x < 16) *out = __shfl_sync(0xffffu, 1, 16);
}
__global__ void half_a_product_kernel() {
  float d[4] = {};
  uint32_t a[4] = {};
  if (threadIdx.x < 16) multiply_accumulate<__half>(d, a, 0, 0);
}
__global__ void misaligned_copy_kernel(const float* x, int in_shared, int in_global) {
  float* memory = Shared(shared_memory()).take<float>(8);
  copy_async(memory + in_shared, x + in_global, true);
}
__global__ void stray_copy_kernel(const float* x) {
  float* memory = Shared(shared_memory()).take<float>(8);
  copy_async(memory + 8, x, true);
}
__global__ void misaligned_row_kernel() {
  uint16_t* memory = Shared(shared_memory()).take<uint16_t>(32 * 9);
  uint32_t to[4];
  load_matrices(to, memory + threadIdx.x * 9);
}
__global__ void overlap_kernel() {
  Shared(shared_memory()).take<float>(8);
  Shared(shared_memory()).take<float>(9);
}
__global__ void write_past_end_kernel(float* out) {
  float* memory = Shared(shared_memory()).take<float>(8);
  memory[threadIdx.x] = 1;
  *out = memory[0];
}
__global__ void read_shared_kernel(float* out, int at) { *out = Shared(shared_memory()).take<float>(8)[at]; }
__global__ void read_global_kernel(const float* x, float* out, int at) { *out = x[at]; }

void test_planted_defects() {
  bool differs = false;
  for (const auto& schedule : kSchedules) {
    emulation::schedule() = schedule;
    differs = differs || !sums_are_right<false>();
  }
  check(differs, "missing barriers show in some order");

  differs = false;
  for (const auto& schedule : kSchedules) {
    emulation::schedule() = schedule;
    differs = differs || !gifts_arrive<false>();
  }
  check(differs, "missing barriers of a cluster show in some order");

  differs = false;
  bool also_differs = false;
  for (const auto& schedule : kSchedules) {
    emulation::schedule() = schedule;
    differs = differs || !shared_gifts_arrive<SharedRing::no_barrier>();
    also_differs = also_differs || !shared_gifts_arrive<SharedRing::no_second_barrier>();
  }
  check(differs, "missing barriers around the shared memory of a cluster show in some order");
  check(also_differs, "missing barriers before shared memory of a cluster is written again show in some order");

  emulation::schedule() = kSchedules[2];
  check(!streamed_sums_are_right<Defect::no_wait>(), "missing copy_wait");
  check(!streamed_sums_are_right<Defect::short_wait>(), "copy_wait that leaves one group too many");
  check(!streamed_sums_are_right<Defect::no_commit>(), "missing copy_commit");
  check(!streamed_sums_are_right<Defect::early_commit>(), "copies after their copy_commit");
  check(!streamed_sums_are_right<Defect::no_barrier>(), "a buffer that is filled while others read it");
  float number = 0;
  launch(read_shared_kernel, 1, 1, floats(8), Stream{}, &number, 7);
  check(std::isnan(number), "uninitialised shared memory");

  int out;
  unsigned votes;
  expect_abort("barrier that some threads never reach", "waits at __syncthreads",
               [] { launch(divergent_barrier_kernel, 2, 64, 0, Stream{}); });
  expect_abort("barrier that some threads never reach: who", "thread 40, which has exited",
               [] { launch(divergent_barrier_kernel, 2, 64, 0, Stream{}); });
  expect_abort("two barriers", "thread 40, which waits at __syncthreads",
               [] { launch(two_barriers_kernel, 1, 64, 0, Stream{}); });
  expect_abort("cluster with a block that has exited", "waits at cluster_barrier",
               [] { launch(exited_block_kernel, Blocks(2, 2), 32, 0, Stream{}); });
  expect_abort("cluster with a block that has exited: which", "for block 1, which has exited",
               [] { launch(exited_block_kernel, Blocks(2, 2), 32, 0, Stream{}); });
  expect_abort("cluster barrier that some threads never reach", "for thread 7, which has exited",
               [] { launch(divergent_cluster_barrier_kernel, Blocks(2, 2), 32, 0, Stream{}); });
  expect_abort("shared memory of a block that may not have started", "may not have started",
               [] { shared_gifts_arrive<SharedRing::early>(); });
  expect_abort("shared memory of a block that has exited", "has exited",
               [] { shared_gifts_arrive<SharedRing::late>(); });
  expect_abort("a block that has exited is written to",
               emulation::kAddressSanitizer ? "use-after-poison" : "had exited",
               [] { launch(late_write_kernel, Blocks(2, 2), 32, floats(1), Stream{}); });
  expect_abort("a block outside the cluster", "block 2 of a cluster of 2",
               [] { launch(outside_cluster_kernel, Blocks(2, 2), 32, floats(1), Stream{}); });
  expect_abort("prefetch of what is not aligned", "not a multiple of 16",
               [&] { launch(misaligned_prefetch_kernel, 1, 1, 0, Stream{}, (const float*)&number); });
  expect_abort("barrier and shuffle", "waits at __shfl_sync with mask 0xffffffff",
               [&] { launch(barrier_and_shuffle_kernel, 1, 32, 0, Stream{}, &out); });
  expect_abort("mask with an exited lane", "thread 16, which has exited",
               [&] { launch(exited_lane_kernel, 1, 64, 0, Stream{}, &out); });
  expect_abort("mask with a lane that does not exist", "thread 40, which does not exist",
               [] { launch(missing_lane_kernel, 1, 40, 0, Stream{}); });
  expect_abort("two masks", "which waits at __ballot_sync with mask 0xffff0000",
               [&] { launch(two_masks_kernel, 1, 17, 0, Stream{}, &votes); });
  expect_abort("mask without the own lane", "which lacks its own lane",
               [&] { launch(own_mask_kernel, 1, 32, 0, Stream{}, &votes); });
  expect_abort("shuffle from outside the mask", "asks lane 16, outside its mask 0x0000ffff",
               [&] { launch(outside_mask_kernel, 1, 32, 0, Stream{}, &out); });
  expect_abort("product of half a warp", "waits at multiply_accumulate",
               [] { launch(half_a_product_kernel, 1, 32, 0, Stream{}); });

  alignas(16) static float x[8] = {};
  const float* start = x;
  expect_abort("misaligned copy: shared", "not a multiple of 16",
               [=] { launch(misaligned_copy_kernel, 1, 1, floats(8), Stream{}, start, 1, 0); });
  expect_abort("misaligned copy: global", "reads an address that is not a multiple of 16",
               [=] { launch(misaligned_copy_kernel, 1, 1, floats(8), Stream{}, start, 0, 1); });
  expect_abort("copy to outside shared memory", "not inside a piece",
               [=] { launch(stray_copy_kernel, 1, 1, floats(8), Stream{}, start); });
  expect_abort("misaligned matrix row", "load_matrices: an address that is not a multiple of 16",
               [] { launch(misaligned_row_kernel, 1, 32, floats(32 * 9), Stream{}); });
  expect_abort("pieces that overlap", "overlaps another one",
               [] { launch(overlap_kernel, 1, 1, floats(64), Stream{}); });
  expect_abort("more shared memory than given", "but the launch gave 32",
               [&] { launch(read_shared_kernel, 1, 1, 32, Stream{}, &number, 0); });

  if (emulation::kAddressSanitizer) {
    expect_abort("write past the end of shared memory", "use-after-poison",
                 [&] { launch(write_past_end_kernel, 1, 9, floats(8), Stream{}, &number); });
    expect_abort("read past the end of shared memory", "use-after-poison",
                 [&] { launch(read_shared_kernel, 1, 1, floats(8), Stream{}, &number, 8); });
    std::unique_ptr<float[]> global(new float[8]());
    expect_abort("read past the end of global memory", "heap-buffer-overflow",
                 [&] { launch(read_global_kernel, 1, 1, 0, Stream{}, (const float*)global.get(), &number, 8); });
  } else {
    expect_abort("write past the end of shared memory", "wrote past the end of a piece",
                 [&] { launch(write_past_end_kernel, 1, 9, floats(8), Stream{}, &number); });
    std::printf("skipped: reads out of bounds, which only the address sanitizer finds\n");
  }
}

}  // namespace
}  // namespace diffrate::cuda

int main() {
  diffrate::cuda::test_planted_defects();
  return diffrate::testing::report("planted defects");
}
