// A function with a stack of its own, which pauses and is resumed on one thread of the operating system.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace diffrate::emulation {

class Fiber {
 public:
  explicit Fiber(void (*body)());  // `body` never returns; it starts at the first resume()
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();  // until the body pauses
  void pause();   // only from within the body

 private:
#if defined(__x86_64__)
  using Context = void*;  // the stack pointer, with all that must be kept stored above it
#else
  using Context = ucontext_t;
#endif
  static void start();
  static void switch_context(Context* from, Context* to);

  void (*body_)();
  unsigned char* stack_;
  Context own_, caller_;
  // what the address sanitizer needs to know of the two stacks
  void* own_record_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_bytes_ = 0;
};

}  // namespace diffrate::emulation
