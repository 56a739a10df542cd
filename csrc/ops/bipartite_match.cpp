#include "common/bipartition.h"
#include "ops/run.h"

namespace diffrate::ops {
namespace {

Tensor bipartite_match(Tensor keys, int64_t merged, int64_t prefix) {
  DIFFRATE_CHECK(keys.dim() == 3 || keys.dim() == 4, "keys must be (B, N, D) or (B, H, N, D)");
  const int64_t dims = keys.dim(), heads = dims == 4 ? keys.size(1) : 1, tokens = keys.size(dims - 2);
  DIFFRATE_CHECK(heads > 0, "keys has no heads");
  DIFFRATE_CHECK(tokens < INT32_MAX, "keys has too many tokens");
  DIFFRATE_CHECK(prefix >= 0 && prefix <= tokens, "prefix must be between 0 and the number of tokens");
  keys = with_unit_last_stride(keys);
  Tensor slot = empty_like(keys, {keys.size(0), tokens}, ScalarType::Long);
  BipartiteMatchArgs args{.type = type_of(keys, "keys"),
                          .images = keys.size(0),
                          .heads = heads,
                          .tokens = tokens,
                          .head_dim = keys.size(dims - 1),
                          .prefix = prefix,
                          .merged = merged,
                          .keys = {.data = keys.const_data_ptr(),
                                   .stride_image = keys.stride(0),
                                   .stride_head = dims == 4 ? keys.stride(1) : 0,
                                   .stride_token = keys.stride(dims - 2)},
                          .slot = static_cast<int64_t*>(slot.mutable_data_ptr())};
  const Bipartition split = bipartition(args);
  DIFFRATE_CHECK(merged >= 0 && merged <= (split.destinations > 0 ? split.sources : 0),
                 "merged must be at most the number of tokens at even positions, with one at an odd position");
  run::bipartite_match(keys, args);
  return slot;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffrate, library) {
  library.def("bipartite_match(Tensor keys, SymInt merged, int prefix=1) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(diffrate, CPU, library) { library.impl("bipartite_match", TORCH_BOX(&bipartite_match)); }
STABLE_TORCH_LIBRARY_IMPL(diffrate, CUDA, library) { library.impl("bipartite_match", TORCH_BOX(&bipartite_match)); }

}  // namespace diffrate::ops
