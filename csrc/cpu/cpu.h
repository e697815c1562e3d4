/* Shared by all CPU kernels: the thread pool, scratch memory, validation of arguments.
 *
 * Kernel files are compiled once per instruction set, in namespace fastmp::FASTMP_TARGET.
 * Everything here lives in that namespace too, and nothing from the C++ library's templates is
 * used: the linker would keep one copy of a shared inline function, perhaps the AVX-512 one, for
 * every CPU. */
#ifndef FASTMP_CPU_H
#define FASTMP_CPU_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../common/numerics.h"
#include "../fastmp.h"

namespace fastmp {

/* Runs fn over [0, n) on the caller's thread pool, or without one on this thread (api.cpp). */
void run_parallel(int64_t n, int64_t grain, fastmp_range_fn fn, void* ctx);

namespace FASTMP_TARGET {

template <class Body>
static inline void parallel_for(int64_t n, int64_t grain, const Body& body) {
  run_parallel(
      n, grain,
      [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const Body*>(ctx))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

/* Uninitialised memory for n values of a plain type, aligned to a cache line, freed at the end of
 * the scope. data is null if the allocation failed. */
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n) : data(nullptr) {
    constexpr int64_t kLine = 64;
    const int64_t bytes = static_cast<int64_t>(sizeof(T)) * (n > 0 ? n : 1);
    data = static_cast<T*>(
        aligned_alloc(kLine, static_cast<size_t>((bytes + kLine - 1) / kLine * kLine)));
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

/* ---- validation of arguments ---- */

/* Bytes per value of a valid fastmp_dtype. */
static inline int64_t bytes_of(int32_t dtype) {
  return dtype == FASTMP_F32 ? 4 : dtype == FASTMP_U8 ? 1 : 2;
}

/* Calls body with a value of the type that a floating-point fastmp_dtype stands for. */
template <class Body>
static inline auto with_float_type(int32_t dtype, const Body& body) {
  switch (dtype) {
    case FASTMP_F32:
      return body(float());
    case FASTMP_F16:
      return body(f16());
    default:
      return body(bf16());
  }
}

static inline bool is_float(int32_t dtype) {
  return dtype >= FASTMP_F32 && dtype <= FASTMP_BF16;
}

/* Whether an array of these sizes, in values of `width` bytes, can exist: no size is negative, and
 * the bytes are at most the 2^47 that a process can address. */
template <class... Sizes>
static inline bool is_addressable(int64_t width, Sizes... sizes) {
  constexpr int64_t kMaxBytes = INT64_C(1) << 47;
  int64_t bytes = width;
  const auto grows = [&](int64_t size) {
    return size >= 0 && size <= kMaxBytes && !__builtin_mul_overflow(bytes, size, &bytes) &&
           bytes <= kMaxBytes;
  };
  return (grows(sizes) && ...);
}

/* Whether every pointer is a multiple of `width` bytes; null is. */
template <class... Pointers>
static inline bool is_aligned(int64_t width, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % static_cast<uintptr_t>(width) == 0) && ...);
}

/* Whether two blocks of memory share no byte, or one of them is null. Indices are checked before
 * the first write, so no output may overlap an index. */
static inline bool disjoint(const void* a, int64_t bytes_a, const void* b, int64_t bytes_b) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
  if (a == nullptr || b == nullptr) return true;
  return first + static_cast<uintptr_t>(bytes_a) <= second ||
         second + static_cast<uintptr_t>(bytes_b) <= first;
}

}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
