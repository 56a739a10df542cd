// The device, as the kernels see it: everything that is not plain C++.
//
// Kernels use, besides this file, only threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, __syncthreads, __syncwarp,
// __shfl_sync, __shfl_xor_sync, __ballot_sync, __popc, __ffs, __hadd2, the conversions of __half and __nv_bfloat16, and
// <math.h>. They take all shared memory from `Shared`, and are started by `launch`. So the same sources run as host C++
// in tests, where csrc/testing/overrides/cuda/device.cuh stands first in the include path and defines these names
// again.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "cuda/pieces.cuh"

namespace diffrate::cuda {

using Stream = cudaStream_t;

// Shared memory of a block.
class Shared : public Pieces {
 public:
  using Pieces::Pieces;
};

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char diffrate_shared[];
  return diffrate_shared;
}

// Copies 16 bytes to shared memory in the background; zeros instead where `valid` is false (nothing is read then).
// Arrived after copy_wait, visible to other threads after a barrier besides.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// Ends a group of copies.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest `kPending` groups of this thread have arrived.
template <int kPending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory. Lane 8 m + r names row r of matrix m (16 bytes, aligned);
// a lane receives of each matrix the pair at row lane / 4, columns 2 (lane % 4) and the next.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
// The same, each matrix transposed: the pair at rows 2 (lane % 4) and the next, column lane / 4.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// 1 / number, but for the last bit; numbers below the smallest normal one count as zero.
__device__ inline float reciprocal(float number) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(number));
  return result;
}

// Addresses in shared memory by themselves, for kernels that compute many: they are half as long as pointers.
using SharedAddress = uint32_t;
__device__ inline SharedAddress shared_address(void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
// As above, but free to move: for memory that is not written while matrices of it are loaded, but for barriers between.
__device__ inline void load_matrices(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}
// As above, of memory whose next bytes are asked for soon: the cache fetches 128 bytes at once.
__device__ inline void copy_async(SharedAddress to, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Asks for the 128 bytes around an address to be brought near.
__device__ inline void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// The same number, but the compiler does not know that: what follows from it is computed where it is used, rather than
// early, and kept in registers meanwhile.
__device__ inline int opaque(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// d += a b on the tensor cores: a (16, 16), b (16, 8), in the fragments of PTX's mma.m16n8k16. With g = lane / 4 and
// t = lane % 4 a lane holds
//   of a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8, and the column after each;
//   of b: rows 2t and 2t + 8, and the row after each, at column g;
//   of d: row g at columns 2t and 2t + 1, then row g + 8 at the same.
template <class T>
__device__ inline void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_accumulate<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_accumulate<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = a b + c, in the same fragments. Free to move, and with c elsewhere than in d: a sum may start from anything.
template <class T>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const float (&c)[4]);

template <>
__device__ inline void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                            const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                   const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// As __syncthreads, which all warps of a block must reach at the same place of the program, but each warp may stand at
// a place of its own: to PTX a barrier is its number.
__device__ inline void barrier_of_warps() { asm volatile("bar.sync 1, %0;" ::"r"(blockDim.x) : "memory"); }

// Waits for all threads of all blocks of the cluster; what they wrote to device memory before is visible after.
__device__ inline void cluster_barrier() {
  __syncwarp();  // whole warps must arrive
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// --- shared memory of other blocks of the cluster

// Waits for all threads of all blocks of the cluster; what each block wrote to its own shared memory before is visible
// to all after. Unlike cluster_barrier this does not wait for what is on its way to device memory.
__device__ inline void cluster_barrier_for_shared() {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1208
  cluster_barrier();
#elif __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile(
      "fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\nfence.acquire.sync_restrict::shared::cluster.cluster;" ::
          : "memory");
#endif
}

// Where block `rank` of the cluster has what this block has at `mine` in shared memory. To be used between the first
// barrier of the cluster, before which that block may not have started, and the last, after which it may have exited.
template <class T>
__device__ inline T* of_block(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(there);
#else
  return mine;
#endif
}

// Asks for memory to be brought into the L2 cache. Address and bytes are multiples of 16.
__device__ inline void prefetch_l2(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// --- the device and launches

inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
// Of the current device: the most shared memory that a block may ask for, and the number of multiprocessors.
inline int64_t shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int64_t multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Whether blocks of this kernel can form clusters. A new device is not enough: cluster_barrier waits only in what was
// compiled for sm_90 or later, and a device may run what was compiled for an older one.
template <class... Parameters>
bool has_clusters(void (*kernel)(Parameters...)) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return false;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess && attributes.ptxVersion >= 90;
}

// Lets the cache beside shared memory be as small as it can, so that as many blocks as possible fit a multiprocessor.
template <class... Parameters>
void prefer_shared_memory(void (*kernel)(Parameters...)) {
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  if (error != cudaSuccess) cudaGetLastError();  // a wish
}

// How many blocks a launch has. Each `cluster` neighbours, at most 8, run at the same time and can wait for each other.
struct Blocks {
  int64_t count;
  int cluster;
  Blocks(int64_t blocks, int cluster_size = 1) : count(blocks), cluster(cluster_size) {}
};

// Starts a kernel. Returns nullptr, or what went wrong. No blocks: nothing to do.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), Blocks blocks, int threads, int64_t shared_bytes, Stream stream,
                   Parameters... arguments) {
  if (blocks.count == 0) return nullptr;
  if (blocks.count > INT32_MAX) return "too many blocks for one launch";
  if (shared_bytes > 48 * 1024) {  // more than every device has without being asked
    cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(cudaGetLastError());
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks.count));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = blocks.cluster > 1 ? 1 : 0;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // not left behind for whoever asks next
  return cudaGetErrorString(error);
}

}  // namespace diffrate::cuda
