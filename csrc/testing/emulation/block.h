// A block of emulated threads. Each is a fiber; one runs at a time, until it waits at a barrier or a warp collective or
// exits. schedule.h says which one is next.
//
// It prints what is wrong and aborts when a barrier or collective is not reached, on the same line and with the same
// mask, by all threads that it is for; when a mask lacks the caller or the lane that is asked; when shared memory is
// used outside the pieces that `Shared` handed out, or by another block of the cluster that does not know that this one
// has started, or that it has not exited; and when the address of a background copy or of a matrix' row is not aligned
// (UBSan sees the others).
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "testing/emulation/fiber.h"
#include "testing/emulation/schedule.h"

namespace diffrate::cuda {

constinit inline thread_local uint3 threadIdx{}, blockIdx{};
constinit inline thread_local dim3 blockDim{}, gridDim{};

}  // namespace diffrate::cuda

namespace diffrate::emulation {

constexpr int kWarp = 32;
constexpr int64_t kRedZone = 64;             // bytes after each piece of shared memory
constexpr int64_t kMostShared = 227 * 1024;  // bytes that a block may have on any device
// What it may have on the emulated one: at first the least of all devices from sm_80 on.
inline int64_t& shared_limit() {
  static int64_t limit = 99 * 1024;
  return limit;
}

using Kernel = std::function<void()>;
using Where = std::source_location;

// Carries out a warp collective on the arguments of its lanes; null for lanes outside the mask.
using Perform = void (*)(void* const (&arguments)[kWarp]);

class Block;
using Blocks = std::deque<Block>;

class Block {
 public:
  static Block& running();  // on this thread of the operating system

  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // With the first `count` of `cluster` it makes one.
  void start(int index, Blocks& cluster, int count, int threads, int64_t shared_bytes, const Kernel& kernel);
  void run();  // until all threads have exited, or all wait at cluster_barrier
  bool exited() const;
  void check_same_cluster_barrier(const Block& other);
  void release();  // from the barrier
  void finish();

  // For the thread that is running:
  void barrier(Where where);
  void cluster_barrier(Where where);
  void collective(const char* what, unsigned mask, void* arguments, Perform perform, Where where);
  void copy_async(void* shared, const void* global, bool valid);
  void copy_commit();
  void copy_wait(int pending);
  unsigned char* shared_memory() { return shared_; }
  unsigned char* of_block(unsigned char* mine, int rank);
  void prefetch(const void* from, int bytes) const;
  void hand_out(unsigned char* piece, int64_t bytes);
  void check_shared(const char* what, const void* address, int64_t bytes) const;  // aligned, and inside one piece
  [[noreturn, gnu::format(printf, 2, 3)]] void fail(const char* format, ...) const;

 private:
  struct Wait {  // what a thread waits at; no `what`: it does not wait
    const char* what = nullptr;
    unsigned mask = 0;
    void* arguments = nullptr;
    Perform perform = nullptr;
    Where where;
    bool same_as(const Wait& other) const;
    std::string text() const;
  };
  struct Copy {
    void* to;
    const void* from;
    bool valid;
  };
  struct Thread {
    bool exited = false;
    bool past_cluster_barrier = false;  // before, other blocks of the cluster may not have started
    Wait wait;
    std::vector<Copy> copies;    // not yet arrived, oldest first
    std::vector<size_t> groups;  // where in `copies` each group ends
    std::string text() const;
  };
  struct Piece {
    unsigned char* start;
    int64_t bytes;
  };

  static void thread_main();
  void check_waiting();
  void check_reached(int thread, int missing);
  void check_red_zones() const;
  void retire();
  void pause(const Wait& wait);

  int index_ = 0, cluster_ = 1;
  Blocks* all_ = nullptr;  // of the cluster, the first ones
  const Kernel* kernel_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<std::unique_ptr<Fiber>> fibers_;  // at least as many
  Ready ready_;
  int thread_ = 0;  // the one that runs
  unsigned char* shared_;
  int64_t shared_bytes_ = 0;
  std::vector<Piece> pieces_;
};

}  // namespace diffrate::emulation
