#include "testing/emulation/schedule.h"

#include <algorithm>
#include <bit>
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

void Ready::add(int thread) {
  words_[thread / 64] |= uint64_t{1} << thread % 64;
  ++count_;
}

void Ready::add_all(int threads) {
  for (int thread = 0; thread < threads; ++thread) add(thread);
}

int Ready::take() {
  Order order = schedule().order;
  auto taken = [&](int word, int bit) {
    words_[word] &= ~(uint64_t{1} << bit);
    --count_;
    return word * 64 + bit;
  };
  if (order == Order::reverse) {
    int word = kWords - 1;
    while (words_[word] == 0) --word;
    return taken(word, 63 - std::countl_zero(words_[word]));
  }
  uint64_t start = order == Order::random ? generator() % (kWords * 64) : 0;
  int word = static_cast<int>(start / 64);
  uint64_t from_start = words_[word] >> start % 64 << start % 64;
  if (from_start != 0) return taken(word, std::countr_zero(from_start));
  do word = (word + 1) % kWords;
  while (words_[word] == 0);
  return taken(word, std::countr_zero(words_[word]));
}

}  // namespace diffrate::emulation
