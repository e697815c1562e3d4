/* The fast path of phase 2 with 8-bit states: the bits of the general path in fewer instructions,
 * for values in the range that training has. Roots and ratios without branches, split bf16 masters
 * two in a word, codes four. A warp that meets a value out of range (inf, NaN, a first moment below
 * 2^-80) takes the general path instead, before it has written anything.
 *
 * Instructions an element on sm_90, AdamW: 73 with fp32 weights, where the general path has 96; 82
 * with bf16 ones, 116. */
#ifndef FASTMP_UPDATE_FAST_H
#define FASTMP_UPDATE_FAST_H

#include "update_apply.h"

namespace fastmp {

/* Correctly rounded roots and ratios, by the instructions of CUDA's own, which test for their
 * special cases with a branch in each of them. Here a packet has one test of all. */
struct FastArithmetic {
  uint32_t least_radicand = 0xffffffffu; /* bits - 1: that of 0 is the largest */
  uint32_t least_dividend = 0xffffffffu; /* the same, turned left by the sign: -0 is the least */
  uint32_t divisor = 0u;                 /* bits above kLeastDivisor, the most */
  float sum = 0.0f;                      /* of masters: not finite if one is above 2^120 */

  __device__ __forceinline__ float root(float x) {
    least_radicand = min_of(least_radicand, bits_of(x) - 1u);
    const float r = approximate_rsqrt(x + 0x1p-126f); /* x, or not inf where x is 0 */
    const float near = x * r;
    return multiply_add(multiply_add(-near, near, x), r * 0.5f, near);
  }

  __device__ __forceinline__ float ratio(float a, float b) {
    least_dividend = min_of(least_dividend, (bits_of(a) << 1 | bits_of(a) >> 31) - 1u);
    divisor = max_of(divisor, bits_of(b) - kLeastDivisor);
    const float near = approximate_reciprocal(b);
    const float r = multiply_add(near, multiply_add(-b, near, 1.0f), near);
    const float first = a * r;
    const float second = multiply_add(r, multiply_add(-b, first, a), first);
    return multiply_add(r, multiply_add(-b, second, a), second);
  }

  __device__ __forceinline__ void check(float master) { sum = multiply_add(master, 256.0f, sum); }

  /* Residuals are exact and no result is subnormal: radicands from 2^-101 and dividends from 2^-80
   * on, or 0; divisors from 2^-60 to 2^42. Of a dividend -0 the sign would be lost. */
  __device__ __forceinline__ bool in_range() const {
    return least_radicand >= 0x0d000000u && least_dividend >= 0x2f000000u &&
           divisor < 0x54800000u - kLeastDivisor && is_finite(sum);
  }

  static constexpr uint32_t kLeastDivisor = 0x21800000u;
};

/* n elements of a tensor as words of two or four. */
template <int n, class T>
FASTMP_DEVICE void read_words(const T* from, uint32_t (&words)[n * sizeof(T) / 4]) {
  read(reinterpret_cast<const uint32_t*>(from), words);
}
template <int n, class T>
FASTMP_DEVICE void write_words(const uint32_t (&words)[n * sizeof(T) / 4], T* to) {
  write(words, reinterpret_cast<uint32_t*>(to));
}

/* ---- masters ---- */

/* By read_masters() and write_masters(), but for split bf16: */
template <class Case, int n,
          bool pairs = Case::master == FASTMP_SPLIT && kDtype<typename Case::Param> == FASTMP_BF16>
struct FastMasters {
  float values[n];

  __device__ __forceinline__ void read(const Tensors<Case>& at, int64_t first) {
    read_masters(at, Whole<n>{first}, values);
  }
  __device__ __forceinline__ void write(const Tensors<Case>& at, int64_t first) const {
    write_masters(at, Whole<n>{first}, values);
  }
};

/* join_master() and split_master() of two, the latter of finite masters. */
template <class Case, int n>
struct FastMasters<Case, n, true> {
  float values[n];

  __device__ __forceinline__ void read(const Tensors<Case>& at, int64_t first) {
    uint32_t weights[n / 2], remainders[n / 2];
    read_words<n>(at.param + first, weights);
    read_words<n>(at.remainder + first, remainders);
    for (int i = 0; i < n / 2; ++i) {
      const uint32_t counted = remainders[i] & remainder_mask(weights[i]);
      const uint32_t low = weights[i] * 65536u + permute_bytes(counted, 0u, 0x9910u);
      const uint32_t high = (weights[i] & 0xffff0000u) + permute_bytes(counted, 0u, 0xbb32u);
      values[2 * i] = float_from_bits(low);
      values[2 * i + 1] = float_from_bits(high);
    }
  }
  __device__ __forceinline__ void write(const Tensors<Case>& at, int64_t first) const {
    uint32_t weights[n / 2], remainders[n / 2];
    for (int i = 0; i < n / 2; ++i) {
      const uint32_t low = bits_of(values[2 * i]), high = bits_of(values[2 * i + 1]);
      weights[i] = permute_bytes(low + 0x8000u, high + 0x8000u, 0x7632u);
      remainders[i] = permute_bytes(low, high, 0x5410u) & nonzero_mask(weights[i]);
    }
    write_words<n>(weights, at.param + first);
    write_words<n>(remainders, at.remainder + first);
  }
};

/* ---- states ---- */

/* Four codes as fp32. A code times 64 is an fp16 number, subnormal ones too, in which U is 2^-14:
 * factor = U * 2^14. */
template <Quantity quantity>
FASTMP_DEVICE void widen_codes(uint32_t codes, float factor, float* values) {
  constexpr bool with_sign = quantity == Quantity::kSigned;
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t selector = with_sign ? (pair == 0 ? 0x9180u : 0xb3a2u)  /* bytes and signs */
                                        : (pair == 0 ? 0x4140u : 0x4342u); /* bytes and zeros */
    const uint32_t shifted = permute_bytes(codes, 0u, selector) << 6;
    const uint32_t halves = with_sign ? shifted & 0x9fc09fc0u : shifted;
    values[2 * pair] = to_float(f16{static_cast<uint16_t>(halves)}) * factor;
    values[2 * pair + 1] = to_float(f16{static_cast<uint16_t>(halves >> 16)}) * factor;
  }
}

/* The code of x in the upper byte, for x * inverse = x / U * 2^-14: the exponent of U / 2 is then
 * 112, of which 5 more places leave 0. random: in bits 5 to 23. */
template <Quantity quantity>
FASTMP_DEVICE uint32_t narrow_to_code(float x, float inverse, uint32_t random) {
  constexpr uint32_t least_code = 0x38080000u; /* 1: of a square above 0 */
  const float magnitude = magnitude_of(x) * inverse;
  const float linear = multiply_add(magnitude, 0.5f, 0x1p-15f);
  uint32_t half = max_of(bits_of(magnitude), bits_of(linear));
  if (quantity != Quantity::kSigned) half = max_of(half, least_code);
  const uint32_t code = half * 32u + random;
  return quantity == Quantity::kSigned ? code | (bits_of(x) & 0x80000000u) : code;
}

/* Random bits of state s in bits 5 to 23; what stands below does not count. */
template <Quantity quantity, int s>
FASTMP_DEVICE uint32_t random_above_5(uint32_t word) {
  if (quantity == Quantity::kMaximum) return 1u << 23;
  return s == 0 ? (word & 0x7ffffu) << 5 : word >> 8;
}

FASTMP_DEVICE uint32_t upper_bytes(const uint32_t* words) {
  return permute_bytes(permute_bytes(words[0], words[1], 0x73u),
                       permute_bytes(words[2], words[3], 0x73u), 0x5410u);
}

/* State s of n elements, of no rule with fewer states. */
template <class Case, int s, int n, bool kept = (s < Case::Rule::states),
          int kind = Case::State::kind>
struct FastState {
  __device__ __forceinline__ void read(const Tensors<Case>&, int64_t) {}
  __device__ __forceinline__ void widen(float (&)[n]) const {}
  __device__ __forceinline__ void narrow(const float (&)[n], const uint32_t (&)[n]) {}
  __device__ __forceinline__ bool in_range() const { return true; }
  __device__ __forceinline__ void write(const Tensors<Case>&, int64_t) const {}
};

template <class Case, int s, int n>
struct FastState<Case, s, n, true, FASTMP_STATE_8BIT> {
  static constexpr Quantity quantity = Case::Rule::quantity(s);
  uint32_t codes[n / 4];
  uint32_t scale, scale_before;

  __device__ __forceinline__ void read(const Tensors<Case>& at, int64_t first) {
    read_words<n>(at.state[s] + first, codes);
    scale_before = scale = load(scale_at<s>(at, first));
  }

  __device__ __forceinline__ void widen(float (&values)[n]) const {
    const float factor = float_from_bits(scale << 23) * 0x1p14f;
    for (int i = 0; i < n / 4; ++i) widen_codes<quantity>(codes[i], factor, values + 4 * i);
  }

  __device__ __forceinline__ void narrow(const float (&values)[n], const uint32_t (&random)[n]) {
    constexpr int sign = quantity == Quantity::kSigned ? 1 : 0; /* a square has none */
    uint32_t largest = 0u;
    for (int e = 0; e < n; ++e) largest = max_of(largest, bits_of(values[e]) << sign);
    largest = max_in_group(largest >> sign);
    scale = Case::State::template scale_of<quantity>(largest);
    const float inverse = float_from_bits((240u - scale) << 23);
    for (int i = 0; i < n / 4; ++i) {
      uint32_t words[4];
      for (int e = 0; e < 4; ++e) {
        const uint32_t bits = random_above_5<quantity, s>(random[4 * i + e]);
        words[e] = narrow_to_code<quantity>(values[4 * i + e], inverse, bits);
      }
      codes[i] = scale == 0u ? 0u : upper_bytes(words);
    }
  }

  /* Both factors are normal fp32 numbers, and no value is inf or NaN. */
  __device__ __forceinline__ bool in_range() const { return scale < 240u; }

  __device__ __forceinline__ void write(const Tensors<Case>& at, int64_t first) const {
    write_words<n>(codes, at.state[s] + first);
    /* Few scales change in a step, and bytes are dear: with neither reads nor writes of scales a
     * step of 0.526 ms took 0.452 (H200, 105 M, bf16 weights). */
    if (first % Case::State::block == 0 && scale != scale_before) {
      store_bits(static_cast<uint8_t>(scale), scale_at<s>(at, first));
    }
  }
};

/* ---- a packet ---- */

/* update_at() on n elements; false, and nothing is written, if the warp has a value out of range.
 * All of the warp call it. */
template <class Case, int n>
FASTMP_DEVICE bool update_fast(const Tensors<Case>& at, int64_t first, const RowStep<Case>& step) {
  const Whole<n> span = {first};
  typename Case::Grad grads[n];
  FastMasters<Case, n> masters;
  FastState<Case, 0, n> state0;
  FastState<Case, 1, n> state1;
  FastState<Case, 2, n> state2;
  span.read(at.grad, grads);
  masters.read(at, first);
  state0.read(at, first);
  state1.read(at, first);
  state2.read(at, first);
  float averages[n];
  if constexpr (Case::averaged) span.read(at.average, averages);

  bool in_range = state0.in_range() && state1.in_range() && state2.in_range();
  float values[3][n];
  state0.widen(values[0]);
  state1.widen(values[1]);
  state2.widen(values[2]);
  FastArithmetic arithmetic;
  for (int e = 0; e < n; ++e) {
    Case::Rule::apply(masters.values[e], to_float(grads[e]), values[0][e], values[1][e],
                      values[2][e], step.coefficients, arithmetic);
    arithmetic.check(masters.values[e]);
  }
  uint32_t random[n];
  draw(step.key, first, random);
  state0.narrow(values[0], random);
  state1.narrow(values[1], random);
  state2.narrow(values[2], random);
  in_range = in_range && state0.in_range() && state1.in_range() && state2.in_range();
  if (any_in_warp(!(in_range && arithmetic.in_range()))) return false;

  if constexpr (Case::averaged) {
    for (int e = 0; e < n; ++e) {
      averages[e] = move_average(averages[e], masters.values[e], step.rate);
    }
    span.write(averages, at.average);
  }
  masters.write(at, first);
  state0.write(at, first);
  state1.write(at, first);
  state2.write(at, first);
  return true;
}

}  // namespace fastmp
#endif
