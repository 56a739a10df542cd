// Chooses the instruction set at run time.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace diffrate::cpu {

namespace plain {
extern const Kernels table;
}
#if defined(DIFFRATE_X86)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& choose() {
#if defined(DIFFRATE_X86)
  const char* wanted = std::getenv("DIFFRATE_CPU_CAPABILITY");
  auto allowed = [wanted](const char* name) { return !wanted || !*wanted || !std::strcmp(wanted, name); };
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && allowed("avx512")) return avx512::table;
  if (has_avx2 && (allowed("avx2") || allowed("avx512"))) return avx2::table;
#endif
  return plain::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace diffrate::cpu
