#include "testing/emulation/fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "testing/emulation/sanitizer.h"

namespace diffrate::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // address space: only what is touched costs memory
constexpr size_t kGuardBytes = 64 * 1024;   // below it, so that an overflow stops the program; a multiple of any page

thread_local Fiber* starting = nullptr;

}  // namespace

#if defined(__x86_64__)

// Pushes the registers that a called function must keep, stores the stack pointer at *rdi, and does the reverse with
// the stack at *rsi.
extern "C" __attribute__((visibility("hidden"))) void diffrate_switch_stack(void** from, void** to);
asm(R"(
  .text
  .globl diffrate_switch_stack
  .hidden diffrate_switch_stack
  .type diffrate_switch_stack, @function
diffrate_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size diffrate_switch_stack, .-diffrate_switch_stack
)");

void Fiber::switch_context(Context* from, Context* to) { diffrate_switch_stack(from, to); }

#else

void Fiber::switch_context(Context* from, Context* to) { swapcontext(from, to); }

#endif

Fiber::Fiber(void (*body)()) : body_(body) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    std::perror("emulated device: no memory for the stack of a thread");
    std::abort();
  }
  stack_ = static_cast<unsigned char*>(memory) + kGuardBytes;
#if defined(__x86_64__)
  // from the top: a return address that ends backtraces, start() to "return" to, six registers (all zero)
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  top[-2] = reinterpret_cast<void*>(&Fiber::start);
  own_ = top - 8;
#else
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = kStackBytes;
  own_.uc_link = nullptr;
  makecontext(&own_, &Fiber::start, 0);
#endif
}

Fiber::~Fiber() {
  unpoison(stack_, kStackBytes);
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::start() {
  Fiber* fiber = starting;
  enter_stack(nullptr, &fiber->caller_stack_, &fiber->caller_bytes_);
  fiber->body_();
  std::abort();  // the body returned
}

void Fiber::resume() {
  starting = this;
  void* caller_record = nullptr;
  leave_stack(&caller_record, stack_, kStackBytes);
  switch_context(&caller_, &own_);
  enter_stack(caller_record, nullptr, nullptr);
}

void Fiber::pause() {
  leave_stack(&own_record_, caller_stack_, caller_bytes_);
  switch_context(&own_, &caller_);
  enter_stack(own_record_, &caller_stack_, &caller_bytes_);
}

}  // namespace diffrate::emulation
