/* What every CPU kernel file shares: the thread pool and scratch memory.
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

#include "../fastmp.h"
#include "../numerics.h"

namespace fastmp {

/* Runs fn over [0, n) on the pool that was handed over, or on this thread (api.cpp). */
void run_parallel(int64_t n, int64_t grain, fastmp_range_fn fn, void* ctx);

namespace FASTMP_TARGET {

template <class Body>
static inline void parallel_for(int64_t n, int64_t grain, const Body& body) {
  run_parallel(
      n, grain,
      [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const Body*>(ctx))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

/* Uninitialised memory for n values of a plain type, on a cache line of its own, freed at the end
 * of the scope. data is null if there was none to be had. */
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

template <class T>
static inline T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static inline T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
