// How the kernels share images among threads.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/memory.h"

namespace diffrate::cpu::DIFFRATE_SIMD {
namespace {

template <class Body>
void run(const Threads& threads, int64_t n, const Body& body) {
  auto call = [](void* context, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
  };
  if (threads.count == 1 || n == 1)
    call(const_cast<Body*>(&body), 0, n);
  else
    threads.run(n, call, const_cast<Body*>(&body));
}

// Runs `work` on every image, in three steps: prepare(image, scratch), then part(image, scratch, p, parts) for each
// part p, then finish(image, scratch, parts). `scratch` is work.scratch_bytes(parts) long.
//
// With at least one image per thread a thread does whole images, whose tokens then stay in its cache from step to step.
// With fewer, the parts of an image are shared. Results must not depend on the number of parts.
template <class Work>
void for_images(const Threads& threads, int64_t images, int64_t most_parts, const Work& work) {
  if (images == 0) return;
  if (images >= threads.count || most_parts <= 1) {
    int64_t ranges = images < threads.count ? images : threads.count;
    int64_t bytes = work.scratch_bytes(1);
    Memory memory(ranges * bytes);
    run(threads, ranges, [&](int64_t range) {
      char* scratch = memory.get() + range * bytes;
      for (int64_t image = images * range / ranges; image < images * (range + 1) / ranges; ++image) {
        work.prepare(image, scratch);
        work.part(image, scratch, 0, 1);
        work.finish(image, scratch, 1);
      }
    });
    return;
  }
  int64_t parts = (threads.count + images - 1) / images;
  if (parts > most_parts) parts = most_parts;
  int64_t bytes = work.scratch_bytes(parts);
  Memory memory(images * bytes);
  run(threads, images, [&](int64_t image) { work.prepare(image, memory.get() + image * bytes); });
  run(threads, images * parts,
      [&](int64_t i) { work.part(i / parts, memory.get() + i / parts * bytes, i % parts, parts); });
  run(threads, images, [&](int64_t image) { work.finish(image, memory.get() + image * bytes, parts); });
}

}  // namespace
}  // namespace diffrate::cpu::DIFFRATE_SIMD
