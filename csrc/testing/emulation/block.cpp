#include "testing/emulation/block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>

#include "testing/emulation/sanitizer.h"
#include "testing/emulation/schedule.h"

namespace diffrate::emulation {
namespace {

constexpr const char* kBarrier = "__syncthreads";
constexpr const char* kClusterBarrier = "cluster_barrier";
constexpr unsigned char kUnset = 0xff;  // makes NaNs of all floating-point formats, and -1

thread_local Block* running_block = nullptr;

bool all_unset(const unsigned char* memory, int64_t bytes) {
  return std::all_of(memory, memory + bytes, [](unsigned char byte) { return byte == kUnset; });
}

}  // namespace

Block& Block::running() { return *running_block; }

Block::Block() : shared_(static_cast<unsigned char*>(std::aligned_alloc(1024, kMostShared))) {
  poison(shared_, kMostShared);
}

Block::~Block() {
  unpoison(shared_, kMostShared);
  std::free(shared_);
}

// --- life of a block

void Block::start(int index, Blocks& cluster, int count, int threads, int64_t shared_bytes, const Kernel& kernel) {
  index_ = index;
  all_ = &cluster;
  cluster_ = count;
  kernel_ = &kernel;
  threads_.resize(threads);
  while (fibers_.size() < threads_.size()) fibers_.push_back(std::make_unique<Fiber>(thread_main));
  for (Thread& thread : threads_) {
    thread.exited = false;
    thread.past_cluster_barrier = false;
    thread.copies.clear();
    thread.groups.clear();
  }
  ready_.add_all(static_cast<int>(threads_.size()));
  shared_bytes_ = shared_bytes;
  unpoison(shared_, shared_bytes_);
  std::memset(shared_, kUnset, shared_bytes_);
  poison(shared_, shared_bytes_);
  pieces_.clear();
}

// A fiber serves one block after another.
void Block::thread_main() {
  Block& block = running();
  int thread = block.thread_;
  for (;;) {
    (*block.kernel_)();
    block.threads_[thread].exited = true;
    block.fibers_[thread]->pause();
  }
}

void Block::run() {
  running_block = this;
  cuda::blockIdx.x = static_cast<unsigned>(index_);
  while (!ready_.empty()) {
    thread_ = ready_.take();
    cuda::threadIdx.x = static_cast<unsigned>(thread_);
    fibers_[thread_]->resume();
    if (!ready_.empty()) continue;
    if (exited()) return retire();
    check_waiting();
    if (threads_[0].wait.what == kBarrier) release();
  }
}

bool Block::exited() const {
  return std::all_of(threads_.begin(), threads_.end(), [](const Thread& thread) { return thread.exited; });
}

// Finds writes past the end of a piece where no sanitizer does.
void Block::check_red_zones() const {
  for (const Piece& piece : pieces_) {
    unsigned char* zone = piece.start + piece.bytes;
    unpoison(zone, kRedZone);
    if (!all_unset(zone, kRedZone)) fail("(or another of its cluster) wrote past the end of a piece of shared memory");
  }
}

// All threads have exited: what another block writes here, or hopes to find, is a defect.
void Block::retire() {
  check_red_zones();
  unpoison(shared_, shared_bytes_);
  std::memset(shared_, kUnset, shared_bytes_);
  poison(shared_, shared_bytes_);
}

void Block::finish() {
  unpoison(shared_, shared_bytes_);
  if (!all_unset(shared_, shared_bytes_)) fail("had exited when another block wrote to its shared memory");
  poison(shared_, shared_bytes_);
}

// --- barriers and warp collectives

bool Block::Wait::same_as(const Wait& other) const {
  return what == other.what && mask == other.mask && perform == other.perform && where.line() == other.where.line() &&
         where.column() == other.where.column();
}

std::string Block::Wait::text() const {
  char with_mask[32] = "";
  if (perform) std::snprintf(with_mask, sizeof with_mask, " with mask 0x%08x", mask);
  return std::string("waits at ") + what + with_mask + " (" + where.file_name() + ":" + std::to_string(where.line()) +
         ")";
}

std::string Block::Thread::text() const { return exited ? "has exited" : wait.text(); }

void Block::pause(const Wait& wait) {
  threads_[thread_].wait = wait;
  fibers_[thread_]->pause();
}

void Block::barrier(Where where) { pause({kBarrier, 0, nullptr, nullptr, where}); }

void Block::cluster_barrier(Where where) {
  threads_[thread_].past_cluster_barrier = true;
  if (cluster_ > 1) pause({kClusterBarrier, 0, nullptr, nullptr, where});  // else, as before sm_90, it does nothing
}

void Block::release() {
  for (Thread& thread : threads_) thread.wait.what = nullptr;
  ready_.add_all(static_cast<int>(threads_.size()));
}

// No thread can go on: right only if all wait at one barrier.
void Block::check_waiting() {
  int count = static_cast<int>(threads_.size());
  for (int thread = 0; thread < count; ++thread) {  // collectives first: they say more than the barrier they hold up
    const Wait& wait = threads_[thread].wait;
    for (int lane = 0; lane < kWarp && wait.what && wait.perform; ++lane)
      if (wait.mask >> lane & 1) check_reached(thread, thread / kWarp * kWarp + lane);
  }
  int first = 0;
  while (threads_[first].exited) ++first;
  for (int thread = 0; thread < count; ++thread) check_reached(first, thread);
}

// Fails if `thread` waits for `missing` in vain.
void Block::check_reached(int thread, int missing) {
  const Wait& wait = threads_[thread].wait;
  bool exists = missing < static_cast<int>(threads_.size());
  if (exists && wait.same_as(threads_[missing].wait)) return;
  thread_ = thread;
  fail("%s for thread %d, which %s", wait.text().c_str(), missing,
       exists ? threads_[missing].text().c_str() : "does not exist");
}

// This block waits at cluster_barrier: so must `other`.
void Block::check_same_cluster_barrier(const Block& other) {
  const Wait& wait = threads_[0].wait;
  thread_ = 0;
  if (!wait.same_as(other.threads_[0].wait))
    fail("%s for block %d, which %s", wait.text().c_str(), other.index_, other.threads_[0].text().c_str());
}

// The last lane to arrive carries it out for all.
void Block::collective(const char* what, unsigned mask, void* arguments, Perform perform, Where where) {
  int lane = thread_ % kWarp, first = thread_ - lane;
  if (!(mask >> lane & 1)) fail("calls %s with mask 0x%08x, which lacks its own lane %d", what, mask, lane);
  Wait own{what, mask, arguments, perform, where};
  void* all[kWarp] = {};
  all[lane] = arguments;
  for (int other = 0; other < kWarp; ++other) {
    if (!(mask >> other & 1) || other == lane) continue;
    bool exists = first + other < static_cast<int>(threads_.size());
    if (!exists || !own.same_as(threads_[first + other].wait)) return pause(own);
    all[other] = threads_[first + other].wait.arguments;
  }
  perform(all);
  for (int other = 0; other < kWarp; ++other) {
    if (!(mask >> other & 1) || other == lane) continue;
    threads_[first + other].wait.what = nullptr;
    ready_.add(first + other);
  }
}

// --- shared memory of other blocks

unsigned char* Block::of_block(unsigned char* mine, int rank) {
  if (rank < 0 || rank >= cluster_) fail("of_block: block %d of a cluster of %d", rank, cluster_);
  if (!threads_[thread_].past_cluster_barrier) fail("of_block: block %d of the cluster may not have started", rank);
  Block& other = (*all_)[rank];
  if (other.exited()) fail("of_block: block %d of the cluster has exited", rank);
  for (const Piece& piece : pieces_) {
    if (mine < piece.start || mine >= piece.start + piece.bytes) continue;
    other.hand_out(other.shared_ + (piece.start - shared_), piece.bytes);  // it may come to that later
    return other.shared_ + (mine - shared_);
  }
  fail("of_block: an address that is not inside a piece of the block's shared memory");
}

void Block::prefetch(const void* from, int bytes) const {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) fail("prefetch_l2: not a multiple of 16");
  const auto* start = static_cast<const volatile unsigned char*>(from);
  if (bytes > 0) (void)(start[0] + start[bytes - 1]);  // for the sanitizer
}

// --- copies in the background

// The destination holds neither the old nor the new until the copy has arrived: on a device it may be either.
void Block::copy_async(void* shared, const void* global, bool valid) {
  check_shared("copy_async", shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16) fail("copy_async reads an address that is not a multiple of 16");
  std::memset(shared, kUnset, 16);
  threads_[thread_].copies.push_back({shared, global, valid});
}

void Block::copy_commit() {
  Thread& thread = threads_[thread_];
  thread.groups.push_back(thread.copies.size());
}

void Block::copy_wait(int pending) {
  Thread& thread = threads_[thread_];
  int64_t arrived = static_cast<int64_t>(thread.groups.size()) - pending;
  if (arrived <= 0) return;
  size_t end = thread.groups[arrived - 1];
  for (size_t i = 0; i < end; ++i) {
    const Copy& copy = thread.copies[i];
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + end);
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + arrived);
  for (size_t& group : thread.groups) group -= end;
}

// --- shared memory

// Every thread of a block takes the same pieces. All else stays poisoned.
void Block::hand_out(unsigned char* piece, int64_t bytes) {
  for (const Piece& known : pieces_) {
    if (known.start == piece && known.bytes == bytes) return;
    if (piece < known.start + known.bytes + kRedZone && known.start < piece + bytes + kRedZone)
      fail("takes a piece of shared memory that overlaps another one");
  }
  if (piece < shared_ || piece + bytes + kRedZone > shared_ + shared_bytes_)
    fail("takes shared memory up to byte %ld, but the launch gave %ld (is that the bytes() of the same pieces?)",
         static_cast<long>(piece - shared_ + bytes + kRedZone), static_cast<long>(shared_bytes_));
  pieces_.push_back({piece, bytes});
  unpoison(piece, bytes);
}

void Block::check_shared(const char* what, const void* address, int64_t bytes) const {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("%s: an address that is not a multiple of 16", what);
  auto holds = [&](const Piece& piece) {
    return address >= piece.start && static_cast<const unsigned char*>(address) + bytes <= piece.start + piece.bytes;
  };
  if (std::none_of(pieces_.begin(), pieces_.end(), holds))
    fail("%s: an address that is not inside a piece of the block's shared memory", what);
}

void Block::fail(const char* format, ...) const {
  std::fflush(stdout);
  std::fprintf(stderr, "emulated device: block %d, thread %d: ", index_, thread_);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputs("\n", stderr);
  std::abort();
}

}  // namespace diffrate::emulation
