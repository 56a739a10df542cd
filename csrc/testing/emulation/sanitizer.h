// The address sanitizer's view of stacks and shared memory; nothing in a build without it.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define DIFFRATE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DIFFRATE_ASAN 1
#endif
#endif

#if defined(DIFFRATE_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace diffrate::emulation {

#if defined(DIFFRATE_ASAN)
constexpr bool kAddressSanitizer = true;
inline void poison(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void unpoison(const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
// Around every switch of stacks; `own` keeps what belongs to the stack that is left until it is entered again.
inline void leave_stack(void** own, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(own, bottom, bytes);
}
inline void enter_stack(void* own, const void** bottom_left, size_t* bytes_left) {
  __sanitizer_finish_switch_fiber(own, bottom_left, bytes_left);
}
#else
constexpr bool kAddressSanitizer = false;
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void**, size_t*) {}
#endif

}  // namespace diffrate::emulation
