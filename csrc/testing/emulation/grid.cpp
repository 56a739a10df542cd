#include "testing/emulation/grid.h"

#include <algorithm>
#include <deque>
#include <numeric>

#include "testing/emulation/schedule.h"

namespace diffrate::emulation {
namespace {

std::vector<int> arranged(int64_t count) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  arrange(numbers);
  return numbers;
}

// Each block runs as far as it can before the next one does: where blocks do not wait for each other as they must, the
// order shows.
void run_cluster(Blocks& blocks, int count) {
  auto exited = [](const Block& block) { return block.exited(); };
  auto end = blocks.begin() + count;
  for (;;) {
    for (int i : arranged(count)) blocks[i].run();
    auto waiting = std::find_if_not(blocks.begin(), end, exited);
    if (waiting == end) break;
    for (auto block = blocks.begin(); block != end; ++block) waiting->check_same_cluster_barrier(*block);
    for (auto block = blocks.begin(); block != end; ++block) block->release();
  }
  for (auto block = blocks.begin(); block != end; ++block) block->finish();
}

}  // namespace

void run_grid(int64_t blocks, int cluster, int threads, int64_t shared_bytes, const Kernel& kernel) {
  static thread_local Blocks running;  // kept: their fibers and shared memory serve all launches
  while (running.size() < static_cast<size_t>(cluster)) running.emplace_back();
  restart_schedule();
  cuda::gridDim.x = static_cast<unsigned>(blocks);
  cuda::blockDim.x = static_cast<unsigned>(threads);
  for (int first : arranged(blocks / cluster)) {
    for (int i = 0; i < cluster; ++i)
      running[i].start(first * cluster + i, running, cluster, threads, shared_bytes, kernel);
    run_cluster(running, cluster);
  }
}

}  // namespace diffrate::emulation
