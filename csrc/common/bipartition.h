// Which tokens may merge into which in ToMe's matching, and where all of them go: the rules of its kernels on CPU and
// CUDA.
//
// After the prefix, tokens at even positions are sources and those at odd positions destinations. The `merged` sources
// that are most similar to a destination merge into it. The prefix stays first, then come the other sources, then the
// destinations, each in their order.
#pragma once

#include "common/arguments.h"

namespace diffrate {

struct Bipartition {
  int64_t sources, destinations;              // how many
  int64_t first_source, first_destination;    // tokens; the next ones are two further on
  int64_t first_stays, first_is_merged_into;  // slots
};

DIFFRATE_INLINE Bipartition bipartition(const BipartiteMatchArgs& a) {
  int64_t sources = (a.tokens + 1) / 2 - (a.prefix + 1) / 2;
  return {.sources = sources,
          .destinations = a.tokens / 2 - a.prefix / 2,
          .first_source = (a.prefix + 1) / 2 * 2,
          .first_destination = a.prefix / 2 * 2 + 1,
          .first_stays = a.prefix,
          .first_is_merged_into = a.prefix + sources - a.merged};
}

}  // namespace diffrate
