/* How the states of an element, its moments, are kept in memory: the policies beside the rules of
 * rules.h. A rule computes in fp32 whatever the kind; kernels are compiled for rule x kind.
 *
 * A kind is a struct with
 *   kind      its fastmp_state_kind,
 *   Item      what an element takes in memory,
 *   block     elements that share a scale, of one byte; 0: there are no scales,
 *   dropped   bits that rounding cuts off, so many random ones it takes,
 *   load()    an item under its scale as fp32,
 *   store()   fp32 as an item, with random bits for the rounding.
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
 * for a row and 2^32 elements. An element's word is C. Wellons' lowbias32 (bias 0.17 of 2^32) with
 * one half of the key before and one between its two multiplications, but four elements share the
 * first of them and multiply by a factor of their own in the second: 3 instructions an element
 * instead of 9. Philox4x32-10 costs 20 wide multiplications for four words, which AVX-512 does in
 * halves: it would take longer than the memory does. */
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

/* Of the elements 4 group to 4 group + 3. Bits: uint32_t, or a vector of them. */
constexpr int kRandomGroup = 4;
template <class Bits>
FASTMP_FN Bits random_hash(const RandomKey& key, Bits group) {
  Bits x = group ^ key.first;
  x = (x ^ (x >> 16)) * 0x7feb352du + key.second;
  return x ^ (x >> 15);
}

/* The factors are those of lowbias32 and PCG32. */
FASTMP_FN constexpr uint32_t random_factor(int64_t element) {
  constexpr uint32_t factor = 0x2c9277b5u;
  const int place = static_cast<int>(element % kRandomGroup);
  return 0x846ca68bu * (place & 1 ? factor : 1u) * (place & 2 ? factor * factor : 1u);
}

template <class Bits>
FASTMP_FN Bits finish_word(Bits product) {
  return product ^ (product >> 16);
}

/* Of an element of the group. */
FASTMP_FN uint32_t random_word(uint32_t hash, int64_t element) {
  return finish_word(hash * random_factor(element));
}

/* The random bits of state s; a maximum takes none, so two states share a word. */
template <int count, class Bits>
FASTMP_FN Bits bits_for_state(Bits word, int s) {
  return s == 0 ? word & ((1u << count) - 1u) : word >> (32 - count);
}

/* ---- the kinds ---- */

struct StateF32 {
  static constexpr int kind = FASTMP_STATE_F32;
  static constexpr int block = 0;
  static constexpr int dropped = 16;
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
  static constexpr int dropped = 16;
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
 * The two halves are min(2 h - U, h) with h = code as a number, and max((x + U) / 2, x) back: no
 * comparison, no case, and no product that is rounded.
 *
 * A square above 0 never becomes 0: the update divides by its root. The scale of a block of zeros
 * is 0, with a value that is not finite 255, and the block becomes NaN; their codes are 0. */
struct State8Bit {
  static constexpr int kind = FASTMP_STATE_8BIT;
  static constexpr int block = 32;
  static constexpr int dropped = 19;
  typedef uint8_t Item;

  /* place: the code in bits 19 to 26, where an fp32 number has its exponent and mantissa; whatever
   * in the others. */
  template <Quantity quantity>
  FASTMP_FN float load(uint32_t place, uint32_t scale) {
    constexpr bool with_sign = quantity == Quantity::kSigned;
    constexpr uint32_t mask = with_sign ? 0x03f80000u : 0x07f80000u;
    constexpr uint32_t least = with_sign ? 0x3c000000u : 0x38000000u; /* 2^-7, 2^-15 */
    constexpr float range = with_sign ? 0x1p6f : 0x1p14f;
    const float smallest = float_from_bits(scale == 255u ? 0x7fc00000u : scale << 23);
    const float half = float_from_bits((place & mask) | least) * (smallest * range);
    const float magnitude = min_of(half, multiply_add(half, 2.0f, -smallest));
    const uint32_t sign = with_sign ? (place << 5) & 0x80000000u : 0u;
    return float_from_bits(bits_of(magnitude) | sign);
  }

  /* Of a block by the largest magnitude in it, as bits (uint32_t, or a vector of them). The largest
   * code stands for 15.5/16 of the next power of two: a maximum above it, which may be rounded up,
   * takes the next one. */
  template <Quantity quantity, class Bits>
  FASTMP_FN Bits scale_of(Bits largest) {
    const uint32_t below = quantity == Quantity::kSigned ? 6u : 14u; /* binades above U */
    const Bits none = {}, least = none + kLeastScale, most = none + (254u - below);
    const Bits top = (largest + 0x7ffffu) >> 23;
    const Bits bounded = top < least + below ? least : top - below;
    const Bits finite = bounded > most ? most : bounded;
    return largest == 0u ? none : largest >= 0x7f800000u ? none + 255u : finite;
  }

  /* The largest code of a block. Under the scales 0 and 255 it is the only one. */
  template <Quantity quantity>
  FASTMP_FN uint32_t most_of(uint32_t scale) {
    return scale == 0u || scale == 255u ? 0u : quantity == Quantity::kSigned ? 0x7fu : 0xffu;
  }

  template <Quantity quantity>
  FASTMP_FN uint32_t store(float x, uint32_t random, uint32_t scale, uint32_t most) {
    constexpr bool with_sign = quantity == Quantity::kSigned;
    const uint32_t base = (scale - 1u) << 23; /* U / 2 */
    const uint32_t below = quantity == Quantity::kMaximum ? 1u << (dropped - 1) : random;
    const float magnitude = float_from_bits(bits_of(x) & 0x7fffffffu);
    const float half = max_of(magnitude, multiply_add(magnitude, 0.5f, float_from_bits(base)));
    const uint32_t rounded = (bits_of(half) + below - base) >> dropped;
    const uint32_t sign = with_sign ? (bits_of(x) >> 24) & (most + 1u) & 0x80u : 0u;
    return min_of(max_of(rounded, with_sign ? 0u : 1u), most) | sign;
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
