#include "emulation/schedule.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>

namespace diffrate::emulation {
namespace {

thread_local std::mt19937_64 generator;

Schedule schedule_of_environment() {
  auto variable = [](const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return std::string(value ? value : otherwise);
  };
  std::string order = variable("DIFFRATE_EMULATION_ORDER", "random");
  uint64_t seed = std::strtoull(variable("DIFFRATE_EMULATION_SEED", "1").c_str(), nullptr, 10);
  return {order == "forward" ? Order::forward : order == "reverse" ? Order::reverse : Order::random, seed};
}

}  // namespace

Schedule& schedule() {
  static Schedule schedule = schedule_of_environment();
  return schedule;
}

void restart_schedule() { generator.seed(schedule().seed); }

void arrange(std::vector<int>& numbers) {
  switch (schedule().order) {
    case Order::forward: return std::sort(numbers.begin(), numbers.end());
    case Order::reverse: return std::sort(numbers.begin(), numbers.end(), std::greater<>());
    case Order::random: return std::shuffle(numbers.begin(), numbers.end(), generator);
  }
}

}  // namespace diffrate::emulation
