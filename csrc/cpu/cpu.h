/* What every CPU kernel file shares: the thread pool, scratch memory, bulk conversions.
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
#if defined(__F16C__)
#include <immintrin.h>
#endif

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

/* Uninitialised memory for n values of a plain type, freed at the end of the scope. data is null if
 * there was none to be had. */
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n)
      : data(static_cast<T*>(malloc(sizeof(T) * static_cast<size_t>(n > 0 ? n : 1)))) {}
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

/* ---- bulk conversions: 16-bit storage <-> fp32, n values ---- */

template <class T>
static inline void widen(const T* __restrict src, float* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);
}

template <class T>
static inline void narrow(const float* __restrict src, T* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(src[i], &dst[i]);
}

#if defined(__F16C__)
/* The hardware's fp16 conversions where the target has them: one instruction for about twelve. */
template <>
inline void widen<f16>(const f16* __restrict src, float* __restrict dst, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(
        dst + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i))));
#endif
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

template <>
inline void narrow<f16>(const float* __restrict src, f16* __restrict dst, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(dst + i),
        _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) store(src[i], &dst[i]);
}
#endif

}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
