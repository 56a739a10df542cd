#include "cuda/kernels.h"

namespace diffrate::cuda {

const char* architectures() { return DIFFRATE_CUDA_ARCHITECTURES; }

}  // namespace diffrate::cuda
