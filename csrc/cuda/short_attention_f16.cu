#include "cuda/short_attention.cuh"

namespace diffrate::cuda {

const char* launch_short_attention_f16(int depth, int variant, const ShortLaunch& launch) {
  return launch_short_depth<__half>(depth, variant, launch);
}

}  // namespace diffrate::cuda
