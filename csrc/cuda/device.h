/* What update.cu needs of a GPU, under names that a test can give another meaning: with threads for
 * CUDA's threads and barriers for its barriers the same kernel runs on a CPU (tests/shim). */
#ifndef FASTMP_DEVICE_H
#define FASTMP_DEVICE_H

#include "../common/table.h"

namespace fastmp {

#define FASTMP_DEVICE static __device__ __forceinline__
#define FASTMP_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTMP_SHARED(Type, name) __shared__ Type name

constexpr int kThreads = 256;
constexpr int kWarp = 32;

FASTMP_DEVICE int32_t thread() {
  return static_cast<int32_t>(threadIdx.x);
}
FASTMP_DEVICE int32_t block() {
  return static_cast<int32_t>(blockIdx.x);
}
FASTMP_DEVICE int32_t blocks() {
  return static_cast<int32_t>(gridDim.x);
}
FASTMP_DEVICE void sync_block() {
  __syncthreads();
}

/* The value that the thread `offset` lanes further on in the warp has. */
template <class T>
FASTMP_DEVICE T from_lane_after(T value, int offset) {
  return __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(offset));
}

/* Adds, and returns what was there. What this thread and, after a sync_block, its block wrote
 * before is seen by whoever reads the sum, and the other way round. */
FASTMP_DEVICE uint32_t add_in_order(uint32_t* sum, uint32_t value) {
  __threadfence();
  const uint32_t before = atomicAdd(sum, value);
  __threadfence();
  return before;
}
FASTMP_DEVICE uint32_t read_in_order(const uint32_t* sum) {
  const uint32_t value = *const_cast<const volatile uint32_t*>(sum);
  __threadfence();
  return value;
}

/* What one access moves. */
template <int bytes>
struct Access;
template <>
struct Access<16> {
  typedef uint4 Bits;
};
template <>
struct Access<8> {
  typedef uint2 Bits;
};
template <>
struct Access<4> {
  typedef unsigned int Bits;
};
template <>
struct Access<2> {
  typedef unsigned short Bits;
};

/* What nobody writes during the launch, and somebody reads again. */
template <class T>
FASTMP_DEVICE T read_only(const T* from) {
  return __ldg(from);
}

/* Read for the last time, or written for long: first to leave the L2 cache, where the gradients of
 * phase 1 and the weights of the next forward had better stay. */
template <class T>
FASTMP_DEVICE T read_past_caches(const T* from) {
  return __ldcs(from);
}
template <class T>
FASTMP_DEVICE void write_past_caches(T value, T* to) {
  __stcs(to, value);
}

}  // namespace fastmp
#endif
