/* How the states of an element, its moments, are kept in memory: the policies beside the rules of
 * rules.h. A rule computes in fp32 whatever the kind; kernels are compiled for rule x kind.
 *
 * A kind is a struct with
 *   kind      its fastmp_state_kind,
 *   Item      what an element takes in memory,
 *   load()    an item as fp32,
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
  typedef float Item;
  FASTMP_FN float load(Item item) { return item; }
  template <Quantity>
  FASTMP_FN Item store(float x, uint32_t) {
    return x;
  }
};

/* bf16 keeps the upper 16 bits of fp32: adding 16 random ones below rounds up with the probability
 * of the bits that go. A value beyond the largest bf16 becomes inf in one of 2^16 steps at most;
 * inf and NaN stay what they are. */
struct StateBf16 {
  static constexpr int kind = FASTMP_STATE_BF16;
  typedef bf16 Item;
  FASTMP_FN float load(Item item) { return to_float(item); }
  template <Quantity quantity>
  FASTMP_FN Item store(float x, uint32_t random) {
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

#define FASTMP_STATE_KINDS(X) \
  X(StateF32)                 \
  X(StateBf16)

}  // namespace fastmp
#endif
