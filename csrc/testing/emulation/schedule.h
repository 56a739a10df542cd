// The order in which emulated threads and blocks run.
//
// Forward and reverse always take the first or the last thread that can go on: a warp runs as far ahead of the others
// as barriers let it. Random takes any.
#pragma once

#include <cstdint>
#include <vector>

namespace diffrate::emulation {

// Taken from DIFFRATE_EMULATION_ORDER (forward, reverse or random, the default) and DIFFRATE_EMULATION_SEED when it is
// first asked for.
enum class Order { forward, reverse, random };
struct Schedule {
  Order order;
  uint64_t seed;
};
Schedule& schedule();

void restart_schedule();  // random orders from the seed again, so that every launch repeats
void arrange(std::vector<int>& numbers);

// Threads of a block that can go on.
class Ready {
 public:
  bool empty() const { return count_ == 0; }
  void add(int thread);
  void add_all(int threads);
  int take();

 private:
  static constexpr int kWords = 1024 / 64;
  uint64_t words_[kWords] = {};  // a bit for each thread
  int count_ = 0;
};

}  // namespace diffrate::emulation
