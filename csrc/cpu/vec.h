/* Vectors of fp32 in the width of the target, loads and stores that convert, exp.
 *
 * GCC's vector extensions instead of plain loops where a reduction has a fixed order of lanes, or
 * where a tail must not cost a loop: with AVX-512 a masked load takes rows of 10 classes in one go.
 */
#ifndef FASTMP_VEC_H
#define FASTMP_VEC_H

#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastmp {
namespace FASTMP_TARGET {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t UVec __attribute__((vector_size(kWidth * sizeof(uint32_t))));
typedef uint16_t HalfVec __attribute__((vector_size(kWidth * sizeof(uint16_t))));

static inline Vec broadcast(float x) {
  return x - Vec{};
}

static inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline Vec load(const bf16* p) {
  HalfVec half;
  memcpy(&half, p, sizeof half);
#if defined(__AVX512F__)
  /* In one instruction: GCC 12 widens the halves apart and joins them, in four. */
  return (Vec)((UVec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half) << 16);
#else
  return (Vec)(__builtin_convertvector(half, UVec) << 16);
#endif
}
static inline Vec load(const f16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int64_t i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

static inline void save(Vec v, float* p) {
  memcpy(p, &v, sizeof v);
}
static inline HalfVec to_bf16(Vec v) { /* as store() in numerics.h */
  const UVec bits = (UVec)v;
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UVec nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, HalfVec);
}
static inline void save(Vec v, bf16* p) {
  const HalfVec half = to_bf16(v);
  memcpy(p, &half, sizeof half);
}
static inline void save(Vec v, f16* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < kWidth; ++i) store(v[i], &p[i]);
#endif
}

/* The first n lanes (0 < n < kWidth) from memory, fill in the others. */
template <class T>
static inline Vec load_part(const T* p, int64_t n, float fill) {
  float lanes[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) lanes[i] = fill;
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}
template <class T>
static inline void save_part(Vec v, T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(v[i], &p[i]);
}
#if defined(__AVX512VL__) && defined(__AVX512BW__)
static inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>((1u << static_cast<unsigned>(n)) - 1u);
}
template <>
inline Vec load_part<float>(const float* p, int64_t n, float fill) {
  return (Vec)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p);
}
template <>
inline Vec load_part<bf16>(const bf16* p, int64_t n, float fill) {
  const __mmask16 mask = first_lanes(n);
  const __m512i bits =
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
  return (Vec)_mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, (__m512)bits);
}
template <>
inline Vec load_part<f16>(const f16* p, int64_t n, float fill) {
  const __mmask16 mask = first_lanes(n);
  return (Vec)_mm512_mask_cvtph_ps(_mm512_set1_ps(fill), mask, _mm256_maskz_loadu_epi16(mask, p));
}
template <>
inline void save_part<float>(Vec v, float* p, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
template <>
inline void save_part<bf16>(Vec v, bf16* p, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)to_bf16(v));
}
template <>
inline void save_part<f16>(Vec v, f16* p, int64_t n) {
  const int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph((__m512)v, rounding));
}
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
/* The words of 16 bits first, first + step, ... of 64 in two vectors. */
static inline __m512i word_order(int first, int step) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words order;
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(first + step * i); /* a constant */
  return (__m512i)order;
}
/* Of each of the 32 bits of a, then of b. */
static inline __m512i upper_halves(__m512i a, __m512i b) {
  return _mm512_permutex2var_epi16(a, word_order(1, 2), b);
}
static inline __m512i lower_halves(__m512i a, __m512i b) {
  return _mm512_permutex2var_epi16(a, word_order(0, 2), b);
}
/* 32 bits of the words first to first + 15 of both. */
static inline __m512i joined_words(__m512i low, __m512i high, int first) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words order;
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(first + i / 2 + i % 2 * 32);
  return _mm512_permutex2var_epi16(low, (__m512i)order, high);
}
#endif

/* min(n, kWidth) lanes, 0 < n. */
template <class T>
static inline Vec load_lanes(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : load_part(p, n, 0.0f);
}
template <class T>
static inline void save_lanes(Vec v, T* p, int64_t n) {
  if (n >= kWidth) {
    save(v, p);
  } else {
    save_part(v, p, n);
  }
}

/* n stored values to fp32, and back. */
static inline void widen(const uint8_t* __restrict src, float* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}
template <class T>
static inline void widen(const T* __restrict src, float* __restrict dst, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) save(load(src + i), dst + i);
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}
template <class T>
static inline void narrow(const float* __restrict src, T* __restrict dst, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) save(load(src + i), dst + i);
  for (; i < n; ++i) store(src[i], &dst[i]);
}

/* x within [-limit, limit]; NaN for NaN. */
static inline Vec within(Vec x, float limit) {
  x = x < -limit ? broadcast(-limit) : x;
  return x > limit ? broadcast(limit) : x;
}
/* |x| */
static inline Vec magnitude(Vec x) {
  return (Vec)((UVec)x & 0x7fffffffu);
}

/* x with 0 in one lane. */
static inline Vec without_lane(Vec x, int64_t lane) {
  UVec lanes;
  for (uint32_t i = 0; i < kWidth; ++i) lanes[i] = i; /* a constant */
  return (Vec)((UVec)x & (UVec)(lanes != static_cast<uint32_t>(lane)));
}

/* The larger of each lane; best where x is NaN. */
static inline Vec larger(Vec x, Vec best) {
#if defined(__AVX512F__)
  /* maskz: GCC 12 warns of an undefined value inside the plain intrinsic. */
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)best);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)x, (__m256)best);
#else
  return x > best ? x : best;
#endif
}

/* a * b + c; rounded once where there is an instruction for it. */
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

/* Halves are folded onto each other: the order of a sum depends on the width alone. */
static inline float sum_of_lanes(Vec v) {
  float lanes[kWidth];
  save(v, lanes);
#pragma GCC unroll 4 /* every size is then a constant */
  for (int64_t half = kWidth / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
static inline float largest_lane(Vec v) {
  float lanes[kWidth];
  save(v, lanes);
#pragma GCC unroll 4 /* every size is then a constant */
  for (int64_t half = kWidth / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] = max_of(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

/* Below, exp(x) would be subnormal. */
constexpr float kMinExponent = -87.33f;

/* p 2^n, and 0 where x is below lowest. With AVX-512 no product is taken there at all. */
static inline Vec scale_by_power(Vec p, UVec n, Vec x, float lowest) {
  const Vec power = (Vec)((n << 23) + 0x3f800000u);
#if defined(__AVX512F__)
  const __mmask16 kept =
      _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(lowest), _CMP_NLT_UQ); /* NaN is kept */
  return (Vec)_mm512_maskz_mul_ps(kept, (__m512)p, (__m512)power);
#else
  return x < lowest ? Vec{} : p * power;
#endif
}

/* exp(x) for x <= 0, NaN for NaN; 0 below kMinExponent. No intermediate is subnormal.
 * 2^n * p(r) with n = round(x / ln 2), r = x - n ln 2 (ln 2 in two parts), p by S. Moshier, Cephes
 * expf. At most 0.89 ulp off, over all floats down to there; 1.19 without FMA. */
static inline Vec exp_nonpos(Vec x) {
  const float kMagic =
      12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
  const Vec shifted = x * 1.44269504f + kMagic;
  const Vec n = shifted - kMagic;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r + 1.0f) * r + 1.0f; /* not p * (r * r): the square may be subnormal */
  return scale_by_power(p, (UVec)shifted, x, kMinExponent);
}

/* exp(x) for x <= 0 in 11 instructions instead of 15; 0 below lowest >= kMinExponent, NaN for NaN.
 * 2^n * 2^r with n = round(x / ln 2). A multiply-add that rounds once gives r, so the error is that
 * of 1 / ln 2 in fp32, 1.3e-8 |x|, and of the polynomial, fitted to 7.5e-8. */
static inline Vec exp_nonpos_fast(Vec x, float lowest = kMinExponent) {
  const float kPerLn2 = 1.44269502f;
  const Vec bounded = larger(broadcast(kMinExponent), x); /* -inf - -inf would be NaN below */
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(bounded * kPerLn2),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = (Vec)_mm512_fmsub_ps((__m512)bounded, _mm512_set1_ps(kPerLn2), (__m512)n);
#else
  const float kMagic = 12582912.0f; /* as above */
  const Vec shifted = bounded * kPerLn2 + kMagic;
  const Vec n = shifted - kMagic;
  const Vec r = bounded * kPerLn2 - n;
#endif
  Vec p = r * 1.32764725e-3f + 9.67554189e-3f;
  p = p * r + 5.55071309e-2f;
  p = p * r + 2.40221202e-1f;
  p = p * r + 6.93146944e-1f;
  p = p * r + 1.00000012f;
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
  return scale_by_power(p, (UVec)shifted, x, lowest);
#endif
}

}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
