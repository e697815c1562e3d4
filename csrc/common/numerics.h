/* 16-bit floating-point formats and split master weights, in integer arithmetic, for host and
 * device. Integer arithmetic because GCC 12 does not vectorise _Float16 conversions: an fp16 AdamW
 * built on them ran 3x slower than its fp32 twin. Rounding is to nearest even. */
#ifndef FASTMP_NUMERICS_H
#define FASTMP_NUMERICS_H

#ifdef __CUDACC__
#define FASTMP_FN static __host__ __device__ __forceinline__
#else
#define FASTMP_FN static inline __attribute__((always_inline))
#endif

#include "table.h"

namespace fastmp {

template <class T>
FASTMP_FN constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FASTMP_FN constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
#ifdef __CUDA_ARCH__
/* One instruction; comparison and choice are two. Beside a NaN they give either. */
FASTMP_FN float min_of(float a, float b) {
  return fminf(a, b);
}
FASTMP_FN float max_of(float a, float b) {
  return fmaxf(a, b);
}
#endif
FASTMP_FN constexpr int64_t ceil_div(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}

/* Storage types: 16 bits with a meaning, no arithmetic. */
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

FASTMP_FN float float_from_bits(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } x = {bits};
  return x.f;
}

FASTMP_FN uint32_t bits_of(float value) {
  union {
    float f;
    uint32_t u;
  } x = {value};
  return x.u;
}

FASTMP_FN float to_float(float x) {
  return x;
}

FASTMP_FN float to_float(bf16 x) {
  return float_from_bits(static_cast<uint32_t>(x.bits) << 16);
}

/* a * b + c, rounded once: the product is never rounded, so it is never subnormal. Without the
 * instruction in fp64, where the product is exact and the sum rounded twice, which 1 of 2^29 shows.
 */
FASTMP_FN float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) +
                            static_cast<double>(c));
#endif
}

/* inf and NaN have the largest magnitudes. */
FASTMP_FN bool is_finite(float x) {
  return (bits_of(x) & 0x7fffffffu) < 0x7f800000u;
}

#ifdef __CUDA_ARCH__
/* One instruction each; in PTX, because cuda_fp16.h would have to be found first. */
FASTMP_FN float to_float(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

FASTMP_FN void store(float x, f16* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}
#else
/* Move exponent and mantissa into place, then rebias: +112 for normal numbers, +224 for inf and
 * NaN. A subnormal h is h * 2^-24, which a subtraction from 2^-14 turns into a normal float. */
FASTMP_FN float to_float(f16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t special = magnitude + 0x70000000u;
  const uint32_t subnormal =
      bits_of(float_from_bits(magnitude + 0x38800000u) - float_from_bits(0x38800000u));
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  return float_from_bits(sign | (exponent == 0x0f800000u ? special : finite));
}

/* Normal results: round the 13 bits that go, by integer addition, a carry walking into the
 * exponent. Subnormal results: adding 0.5f leaves the rounded 10-bit mantissa in the low bits. */
FASTMP_FN void store(float x, f16* out) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t bounded = magnitude >= 0x477ff000u ? 0x7c00u : finite;
  out->bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? nan : bounded));
}
#endif

FASTMP_FN void store(float x, float* out) {
  *out = x;
}

FASTMP_FN void store(float x, bf16* out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/* Split master: an fp32 value kept as a bf16 weight and a signed 16-bit remainder,
 *   bits(master) = (bits(weight) << 16) + remainder,
 * exact for every fp32 value whose weight is neither 0 nor inf: from 2^-134 to 3.3953e38. The
 * weight is the nearest bf16; a tie goes away from zero, because under ties-to-even 65,537 values
 * would share one even bf16 and 16 bits tell only 65,536 apart. NaN is stored as the canonical NaN:
 * the carry of one with a full mantissa would reach the sign.
 *
 * A weight that was changed from outside meets the remainder of another one. For all 2^32 pairs the
 * master rounds to the weight: beside 0, inf and NaN, where the sum could be a NaN or a subnormal,
 * the remainder counts as 0. */
FASTMP_FN bool has_remainder(bf16 weight) {
  return ((weight.bits & 0x7fffu) - 1u) < 0x7f7fu; /* neither 0 nor inf nor NaN */
}

FASTMP_FN float join_master(bf16 weight, int16_t remainder) {
  const uint32_t high = static_cast<uint32_t>(weight.bits) << 16;
  const uint32_t low = static_cast<uint32_t>(static_cast<int32_t>(remainder));
  return float_from_bits(has_remainder(weight) ? high + low : high);
}

FASTMP_FN void split_master(float master, bf16* weight, int16_t* remainder) {
  const uint32_t bits = bits_of(master);
  const uint32_t kept = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
  weight->bits = static_cast<uint16_t>((kept + 0x8000u) >> 16);
  *remainder = static_cast<int16_t>(has_remainder(*weight) ? kept & 0xffffu : 0u);
}

/* Split fp16 master. A normal fp16 number keeps 11 bits and an fp32 one 24, so the remainder holds
 * the difference of their bits exactly, and of subnormal weights above 2^-17 too. From there to 0,
 * where fp32 has more bits than weight and remainder together, it counts units of 2^-40: the error
 * is at most 2^-41. Ties go away from zero, as above. A master from 65,520 on is inf. For all 2^32
 * pairs the master rounds to the weight: a remainder of another weight is bounded. */
constexpr uint32_t kLeastExactF16 = 0x81u; /* 2^-17 is 0x80 */

/* Half of the distance to the next weight, in units of the last place of fp32. */
FASTMP_FN int32_t half_distance(uint32_t magnitude) {
  const int32_t subnormal = magnitude < 0x400u ? 0x1000 : 0;
  const int32_t second = magnitude < 0x200u ? 0x2000 : 0;
  const int32_t third = magnitude < 0x100u ? 0x4000 : 0;
  return 0x1000 + subnormal + second + third;
}

/* yes or no by masks: GCC makes branches of such selects, and no vectors of branches. */
FASTMP_FN uint32_t chosen(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

/* The bits of a finite fp16 magnitude as fp32: in 6 instructions, where to_float() takes 14. */
FASTMP_FN uint32_t widened_bits(uint32_t magnitude) {
  const uint32_t normal = (magnitude << 13) + 0x38000000u;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 5.96046448e-8f;
  return chosen(magnitude < 0x400u, bits_of(subnormal), normal);
}

FASTMP_FN float join_master(f16 weight, int16_t remainder) {
  const uint32_t magnitude = weight.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(weight.bits & 0x8000u) << 16;
  const uint32_t value = widened_bits(magnitude);
  const int32_t given = remainder;
  const int32_t least = -half_distance(magnitude - (magnitude > 0u ? 1u : 0u));
  const int32_t most = half_distance(magnitude) - 1;
  const int32_t above = given < least ? least : given;
  const int32_t within = above < most ? above : most;
  const uint32_t exact = value + static_cast<uint32_t>(within);
  const int32_t beside_zero = given < -32767 ? -32767 : given;
  const float rest = static_cast<float>(magnitude == 0u ? beside_zero : given) * 9.09494702e-13f;
  const float coarse = float_from_bits(value) + rest; /* rest: in units of 2^-40 */
  const uint32_t finite = chosen(magnitude >= kLeastExactF16, exact, bits_of(coarse));
  const uint32_t special = (magnitude << 13) + 0x70000000u; /* inf or NaN */
  return float_from_bits(chosen(magnitude < 0x7c00u, finite, special) ^ sign);
}

FASTMP_FN void split_master(float master, f16* weight, int16_t* remainder) {
  const uint32_t bits = bits_of(master) & 0x7fffffffu;
  const uint32_t sign = (bits_of(master) >> 16) & 0x8000u;
  /* Below 2^-14 in units of 2^-40: whole numbers from 2^-17 on. */
  const float small = float_from_bits(bits < 0x38800000u ? bits : 0u);
  const float scaled = small * 1.09951163e12f;
  const int32_t units = static_cast<int32_t>(scaled + (scaled < 8388608.0f ? 0.5f : 0.0f));
  const uint32_t subnormal = static_cast<uint32_t>(units + 0x8000) >> 16;
  const uint32_t normal = (bits - 0x38000000u + 0x1000u) >> 13;
  const uint32_t finite = bits < 0x38800000u ? subnormal : normal;
  const uint32_t bounded = chosen(bits < 0x477ff000u, finite, 0x7c00u);
  const uint32_t magnitude = chosen(bits <= 0x7f800000u, bounded, 0x7e00u);
  const uint32_t exact = bits - widened_bits(magnitude);
  const uint32_t coarse = static_cast<uint32_t>(units) - (magnitude << 16);
  const uint32_t rest = chosen(magnitude >= kLeastExactF16, exact, coarse);
  weight->bits = static_cast<uint16_t>(magnitude | sign);
  *remainder = static_cast<int16_t>(chosen(magnitude < 0x7c00u, rest, 0u));
}

/* The master of a 16-bit weight with an fp32 tensor beside it: finer than the weight only while it
 * rounds to it. A weight that was changed from outside, to NaN too, replaces its master. */
template <class T>
FASTMP_FN float current_master(T weight, float master) {
  T rounded;
  store(master, &rounded);
  const float value = to_float(weight);
  return to_float(rounded) == value ? master : value;
}

}  // namespace fastmp
#endif
