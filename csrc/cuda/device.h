/* The CUDA built-ins of update.cu behind functions that a test replaces: with CPU threads and
 * barriers in their place the same kernel runs on a CPU (tests/kernels/shim). */
#ifndef FASTMP_DEVICE_H
#define FASTMP_DEVICE_H

#include "../common/table.h"

namespace fastmp {

#define FASTMP_DEVICE static __device__ __forceinline__
#define FASTMP_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTMP_ARGUMENT(Type, name) const __grid_constant__ Type name /* read where it lies */
#define FASTMP_SHARED(Type, name) __shared__ Type name

constexpr int kThreads = FASTMP_BLOCK_SIZE; /* from backends/cuda/nvrtc.py */
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

/* The value of the thread `offset` lanes further on in the warp. */
template <class T>
FASTMP_DEVICE T shuffle_down(T value, int offset) {
  return __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(offset));
}

/* The value of the thread whose number in its group of 4 has the bits of `offset` flipped; all of
 * the warp call it. */
constexpr int kGroup = 4;
FASTMP_DEVICE uint32_t shuffle_in_group(uint32_t value, int offset) {
  return __shfl_xor_sync(0xffffffffu, value, offset);
}

/* Whether it is true for a thread of the warp; all of the warp call it. */
FASTMP_DEVICE bool any_in_warp(bool condition) {
  return __any_sync(0xffffffffu, condition) != 0;
}

/* Byte i of the result is the byte of b:a that digit i of the selector names, 0 to 7; with 8 added
 * to the digit, eight times the sign of that byte. */
FASTMP_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

/* Ones in the place of each half of a pair of bf16 numbers that has_remainder(). */
FASTMP_DEVICE uint32_t remainder_mask(uint32_t pair) {
#if __CUDA_ARCH__ >= 900
  uint32_t zeros, mask; /* 0 times inf or NaN is NaN, which no comparison holds for */
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(zeros) : "r"(pair), "r"(0u));
  asm("set.ne.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(pair), "r"(zeros));
  return mask;
#else
  const uint32_t low = (pair & 0x7fffu) - 1u < 0x7f7fu ? 0x0000ffffu : 0u;
  const uint32_t high = (pair >> 16 & 0x7fffu) - 1u < 0x7f7fu ? 0xffff0000u : 0u;
  return low | high;
#endif
}

/* The same for each half that is not 0: as fp16, which has the same zeros. */
FASTMP_DEVICE uint32_t nonzero_mask(uint32_t pair) {
  uint32_t mask;
  asm("set.neu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(pair), "r"(0u));
  return mask;
}

/* 1 / sqrt(x) and 1 / x of normal numbers, within two units in the last place. */
FASTMP_DEVICE float approximate_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTMP_DEVICE float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FASTMP_DEVICE float magnitude_of(float x) {
  return fabsf(x);
}

/* Returns the value before the addition. Acquires and releases: earlier writes of this thread, and
 * after a sync_block of its block, are visible to threads that read the new value. */
FASTMP_DEVICE uint32_t atomic_add_acq_rel(uint32_t* sum, uint32_t value) {
  __threadfence();
  const uint32_t before = atomicAdd(sum, value);
  __threadfence();
  return before;
}
FASTMP_DEVICE uint32_t load_acquire(const uint32_t* sum) {
  const uint32_t value = *const_cast<const volatile uint32_t*>(sum);
  __threadfence();
  return value;
}

/* The type of one access of so many bytes. */
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

/* Memory that is constant during the launch, and is read again. */
template <class T>
FASTMP_DEVICE T read_only(const T* from) {
  return __ldg(from);
}

/* Memory that is read and written once in phase 2. */
template <class T>
FASTMP_DEVICE T load(const T* from) {
  return *from;
}
template <class T>
FASTMP_DEVICE void store_bits(T value, T* to) {
  *to = value;
}

}  // namespace fastmp
#endif
