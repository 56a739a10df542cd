// diffrate_ext._C: importing it loads the operator library it is linked to, after `import torch`.
#include <pybind11/pybind11.h>

#include "ops/build.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "What diffrate_ext was built with. Importing this module registers the operators.";
  module.def(
      "build_info",
      [] {
        diffrate::BuildInfo info = diffrate::build_info();
        py::dict result;
        result["compiler"] = info.compiler;
        result["simd_levels"] = py::str(info.simd_levels).attr("split")();
        result["simd_in_use"] = info.simd_in_use;
        result["cuda_architectures"] = py::str(info.cuda_architectures).attr("split")();
        result["abi_target"] = info.abi_target;
        result["built_with_torch"] = info.torch_version;
        return result;
      },
      "What was built: compiler, instruction sets, CUDA architectures, ABI target.");
  module.def(
      "most_head_channels", &diffrate::most_head_channels, py::arg("float64"),
      "The most channels that a head may have on CUDA, in float64 or in the other dtypes. class_attention and the "
      "CPU take any number.");
}
