/* Bulk copies, their barriers, clusters and half-precision pairs of sm_90 and newer, behind
 * functions that a test replaces by CPU threads (tests/kernels/shim). In PTX, because CUDA's
 * headers would have to be found first. */
#ifndef FASTMP_ASYNC_H
#define FASTMP_ASYNC_H

#include "../common/numerics.h"
#include "device.h"

namespace fastmp {

constexpr int32_t kDivisorParts = 64; /* of a divisor of the loss, each by one block */

#define FASTMP_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define FASTMP_CLUSTER_KERNEL(threads, blocks) \
  __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(threads, 1)

/* An address in the shared memory of this block. Pointers to it have 64 bits, and the compiler
 * computes them again at every use. */
typedef uint32_t SharedAddress;

FASTMP_DEVICE SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

FASTMP_DEVICE Access<16>::Bits load_shared(SharedAddress from, Access<16>::Bits) {
  Access<16>::Bits v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from));
  return v;
}
FASTMP_DEVICE float load_shared(SharedAddress from, float) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from));
  return v;
}
template <class T>
FASTMP_DEVICE T load_shared(SharedAddress from, T) {
  T v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v.bits) : "r"(from));
  return v;
}

/* ---- barriers in shared memory ---- */

/* A phase ends when all arrivals, and all bytes that were announced, have come. The parity of the
 * first phase is 0; waiting for parity 1 passes before it has ended. */
struct Barrier {
  uint64_t state;
};

FASTMP_DEVICE void init(SharedAddress barrier, int32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* After init, before another block or the copies see the barriers. */
FASTMP_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FASTMP_DEVICE void arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrives, and announces bytes of a copy. */
FASTMP_DEVICE void arrive_expecting(SharedAddress barrier, int32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

FASTMP_DEVICE void wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred p;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t@!p bra again;\n\t}" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}

/* Starts a copy of bytes from global memory, a multiple of 16 at addresses that are. */
FASTMP_DEVICE void copy_bulk(SharedAddress to, const void* from, int32_t bytes,
                             SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

/* ---- launches that overlap: launch.Function.launch(early=True) ---- */

/* Once all blocks have called it, or ended, blocks of the next launch may begin beside them. */
FASTMP_DEVICE void allow_next_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/* Until the launch before has ended and its stores are visible here; of a launch that was not early
 * it has. */
FASTMP_DEVICE void wait_for_previous_launch() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* ---- threads ---- */

FASTMP_DEVICE void sync_warp() {
  __syncwarp();
}

/* The first `count` threads of the block, whole warps. */
template <int count>
FASTMP_DEVICE void sync_first_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(count) : "memory");
}

template <class T>
FASTMP_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

/* The largest of the values of a warp; none is NaN. Their bits, as integers in the same order. */
FASTMP_DEVICE float max_over_warp(float value) {
  const auto ordered = [](int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
  const int32_t own = ordered(static_cast<int32_t>(bits_of(value)));
  return float_from_bits(static_cast<uint32_t>(ordered(__reduce_max_sync(0xffffffffu, own))));
}

/* ---- clusters ---- */

FASTMP_DEVICE int32_t rank_in_cluster() {
  int32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

FASTMP_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

FASTMP_DEVICE uint32_t address_in_rank(SharedAddress from, int32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(from), "r"(rank));
  return address;
}

/* Stores to the same place in the shared memory of another block, or of this one. */
FASTMP_DEVICE void store_in_rank(SharedAddress to, float value, int32_t rank) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in_rank(to, rank)), "f"(value)
               : "memory");
}

/* Stores of this thread before it are visible to threads that wait with wait_for_cluster. */
FASTMP_DEVICE void arrive_in_rank(SharedAddress barrier, int32_t rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   address_in_rank(barrier, rank))
               : "memory");
}

FASTMP_DEVICE void wait_for_cluster(SharedAddress barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

/* The value before the addition; orders no other access. */
FASTMP_DEVICE int32_t atomic_add(int32_t* sum, int32_t value) {
  return atomicAdd(sum, value);
}

/* ---- arithmetic ---- */

/* 2^x, relative error 2^-22; 0 for -inf. */
FASTMP_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* 1 / x, within one unit in the last place. */
FASTMP_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FASTMP_DEVICE float log_of(float x) {
  return logf(x);
}

FASTMP_DEVICE float log_1_plus(float x) {
  return log1pf(x);
}

/* The other one where one is NaN. */
FASTMP_DEVICE float larger(float a, float b) {
  return fmaxf(a, b);
}
FASTMP_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b, bf16) {
  uint32_t c;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
FASTMP_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b, f16) {
  uint32_t c;
  asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

/* Two finite numbers, the lowest. */
FASTMP_DEVICE constexpr uint32_t lowest_pair(bf16) {
  return 0xff7fff7fu;
}
FASTMP_DEVICE constexpr uint32_t lowest_pair(f16) {
  return 0xfbfffbffu;
}

/* The values of a word, the first one from its lower half. */
FASTMP_DEVICE void unpack(uint32_t pair, float& low, float& high, bf16) {
  low = float_from_bits(pair << 16);
  high = float_from_bits(pair & 0xffff0000u);
}
FASTMP_DEVICE void unpack(uint32_t pair, float& low, float& high, f16) {
  low = to_float(f16{static_cast<uint16_t>(pair)});
  high = to_float(f16{static_cast<uint16_t>(pair >> 16)});
}

/* Two values in 16 bits each, the first one in the lower half, rounded to nearest even. */
FASTMP_DEVICE uint32_t pack(float low, float high, bf16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
FASTMP_DEVICE uint32_t pack(float low, float high, f16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

/* Without a hint that it is not read again: that costs 0.5 to 2% (H200). */
template <class T>
FASTMP_DEVICE void store_vector(T value, T* to) {
  *to = value;
}

}  // namespace fastmp
#endif
