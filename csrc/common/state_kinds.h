/* How the states of an element, its moments, are kept in memory: the policies beside the rules of
 * rules.h. A rule computes in fp32 whatever the kind; kernels are compiled for rule x kind.
 *
 * A kind is a struct with
 *   kind      its fastmp_state_kind,
 *   Item      what an element takes in memory,
 *   block     elements that share a scale, of one byte; 0: there are no scales,
 *   load()    an item under its scale as fp32,
 *   store()   fp32 as an item, with 16 random bits for the rounding.
 *
 * Why rounding is stochastic: a second moment with beta2 = 0.999 falls by at most 0.1% a step, and
 * half a unit in the last place of bf16 is 0.2 to 0.4%. Rounded to nearest it never falls: after
 * 6,000 steps from 1 towards 0.25 it stands at 1. Rounded up with the probability that makes the
 * expected value the exact one it is at 0.25. */
#ifndef FASTMP_STATE_KINDS_H
#define FASTMP_STATE_KINDS_H

#include "numerics.h"
#include "table.h"

namespace fastmp {

/* What a state is. A maximum is rounded to nearest: rounded stochastically, it would keep the
 * largest of many roundings. */
enum class Quantity { kSigned, kSquare, kMaximum };

/* ---- random bits ---- */

/* The bits of an element at a step are a function of (seed, step, param_index, element) alone: the
 * same for any number of threads, width of vectors and device, so that runs and resumes are equal
 * to the bit. The key is mixed in 64 bits (the finaliser of splitmix64, Steele et al. 2014) once
 * for a row and 2^32 elements; an element then costs two 32-bit multiplications and three
 * xor-shifts (the constants of C. Wellons' lowbias32, bias 0.17 of 2^32), one half of the key
 * before and one between. Philox4x32-10 costs 20 wide multiplications for four words, which AVX-512
 * does in halves: it would take longer than the memory does. */
struct RandomKey {
  uint32_t first, second;
};

FASTMP_FN uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/* For the elements from `element` on to the next multiple of 2^32. */
FASTMP_FN RandomKey random_key(int64_t seed, float step, int64_t param_index, int64_t element) {
  uint64_t key = mix_bits(static_cast<uint64_t>(seed) + 0x9e3779b97f4a7c15ull);
  key = mix_bits(key + bits_of(step));
  key = mix_bits(key + static_cast<uint64_t>(param_index));
  key = mix_bits(key + static_cast<uint64_t>(element >> 32));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

FASTMP_FN uint32_t random_bits(const RandomKey& key, uint32_t element) {
  uint32_t x = element ^ key.first;
  x = (x ^ (x >> 16)) * 0x7feb352du + key.second;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/* The 16 bits of state s; a maximum takes none, so two states share a word. */
FASTMP_FN uint32_t bits_for_state(uint32_t bits, int s) {
  return s == 0 ? bits & 0xffffu : bits >> 16;
}

/* ---- the kinds ---- */

struct StateF32 {
  static constexpr int kind = FASTMP_STATE_F32;
  static constexpr int block = 0;
  typedef float Item;
  template <Quantity>
  FASTMP_FN float load(Item item, uint32_t) {
    return item;
  }
  template <Quantity>
  FASTMP_FN Item store(float x, uint32_t, uint32_t) {
    return x;
  }
};

/* bf16 keeps the upper 16 bits of fp32: adding 16 random ones below rounds up with the probability
 * of the bits that go. inf and NaN stay what they are. */
struct StateBf16 {
  static constexpr int kind = FASTMP_STATE_BF16;
  static constexpr int block = 0;
  typedef bf16 Item;
  template <Quantity>
  FASTMP_FN float load(Item item, uint32_t) {
    return to_float(item);
  }
  template <Quantity quantity>
  FASTMP_FN Item store(float x, uint32_t random, uint32_t) {
    Item item;
    if (quantity == Quantity::kMaximum) {
      fastmp::store(x, &item);
      return item;
    }
    const uint32_t bits = bits_of(x);
    const bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
    const uint32_t nan = (bits & 0x7fffffffu) > 0x7f800000u ? 0x400000u : 0u;
    item.bits = static_cast<uint16_t>((finite ? bits + random : bits | nan) >> 16);
    return item;
  }
};

/* A small floating-point number of 8 bits under one power of two for 32 elements: sign, 3 bits of
 * exponent and 4 of mantissa for a moment with a sign; 4 and 4 for squares, which span 2^18. The
 * scale of a block is one byte, the fp32 exponent of the smallest normal number U:
 *   code >= 16:  bits(x) = ((scale - 1) << 23) + (code << 19)
 *   code <  16:  x = code / 16 * U, the subnormal ones
 * Neighbours differ by 3 to 6%, so a random walk of stochastic roundings leaves the second moment
 * 40% of noise, whatever its size. Measured on blocks whose deviations spread by factors of e^0.5,
 * e^1 and e^1.5 (update against fp32's, relative): 11, 11 and 16%; quartic codes under an fp32
 * maximum 7, 10 and 18%, three times the instructions; a square root to nearest (as FlashOptim) 5,
 * 14% and, where small second moments became 0, 16,600%. Blocks of 128 instead of 32 raise the
 * error of the quartic map by half. Bytes: 1 + 1/32.
 *
 * A square above 0 never becomes 0: the update divides by its root. Scales 0 (all zero) and 255 (a
 * value that is not finite; the block becomes NaN) need no case of their own: with code 0 the
 * formulas give 0 - 0 and inf - inf. */
struct State8Bit {
  static constexpr int kind = FASTMP_STATE_8BIT;
  static constexpr int block = 32;
  typedef uint8_t Item;

  template <Quantity quantity>
  FASTMP_FN float load(uint32_t item, uint32_t scale) {
    const bool with_sign = quantity == Quantity::kSigned;
    const uint32_t code = with_sign ? item & 0x7fu : item;
    const bool subnormal = code < 16u;
    const uint32_t bits = (scale << 23) + (code << 19) - (subnormal ? 0u : 1u << 23);
    const float x = float_from_bits(bits);
    const float magnitude = x - (subnormal ? float_from_bits(scale << 23) : 0.0f);
    const uint32_t sign = with_sign ? (item & 0x80u) << 24 : 0u;
    return float_from_bits(bits_of(magnitude) | sign);
  }

  /* Of a block by the largest magnitude in it, as bits. The largest code stands for 15.5/16 of the
   * next power of two: a maximum above it, which may be rounded up, takes the next one. */
  template <Quantity quantity>
  FASTMP_FN uint32_t scale_of(uint32_t largest) {
    const uint32_t below = quantity == Quantity::kSigned ? 6u : 14u; /* binades above U */
    const uint32_t top = (largest + 0x7ffffu) >> 23;
    const uint32_t bounded = top < kLeastScale + below ? kLeastScale : top - below;
    const uint32_t finite = bounded > 254u - below ? 254u - below : bounded;
    return largest == 0u ? 0u : largest >= 0x7f800000u ? 255u : finite;
  }

  template <Quantity quantity>
  FASTMP_FN uint32_t store(float x, uint32_t random, uint32_t scale) {
    const bool with_sign = quantity == Quantity::kSigned;
    const uint32_t dropped = quantity == Quantity::kMaximum ? 1u << 18 : (random << 3) + 4u;
    const float magnitude = with_sign ? float_from_bits(bits_of(x) & 0x7fffffffu) : x;
    const float smallest = float_from_bits(scale << 23);
    const bool subnormal = magnitude < smallest;
    const float shifted = magnitude + (subnormal ? smallest : 0.0f);
    const uint32_t base = (scale << 23) - (subnormal ? 0u : 1u << 23);
    const uint32_t rounded = (bits_of(shifted) + dropped - base) >> 19;
    const uint32_t most = with_sign ? 0x7fu : 0xffu;
    const uint32_t least = with_sign ? 0u : 1u;
    const uint32_t above = rounded < least ? least : rounded;
    const uint32_t code = above < most ? above : most;
    const uint32_t sign = with_sign ? (bits_of(x) >> 24) & 0x80u : 0u;
    return scale == 0u || scale == 255u ? 0u : code | sign;
  }

  /* U = 2^-95: no code stands for a subnormal fp32 number, nor does 0.1% of one. */
  static constexpr uint32_t kLeastScale = 32u;
};

#define FASTMP_STATE_KINDS(X) \
  X(StateF32)                 \
  X(StateBf16)                \
  X(State8Bit)

}  // namespace fastmp
#endif
