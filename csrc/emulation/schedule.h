// The order in which emulated threads and blocks run.
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

}  // namespace diffrate::emulation
