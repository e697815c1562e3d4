/* Sums over a row of the loss: of 16 bytes, of a warp, of a block, of a cluster, in this order. */
#ifndef FASTMP_LOSS_SUMS_H
#define FASTMP_LOSS_SUMS_H

#include "loss_ring.h"

namespace fastmp {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLowest = -3.402823466e38f; /* finite: -inf - kLowest is -inf, and not NaN */

/* ---- sums over a row ---- */

/* Over the logits seen so far (Milakov & Gimelshein 2018). */
struct Sums {
  float max;    /* targets included */
  float others; /* Σ exp(z - max), without the targets */
  float below;  /* Σ w (z - max): no term is positive, and nothing cancels */
  float count;  /* Σ w */
};

constexpr Sums kNothing = {kLowest, 0.0f, 0.0f, 0.0f};

/* Relative to a larger maximum. */
FASTMP_DEVICE void raise(Sums& sums, float max) {
  const float change = sums.max - max;
  sums.others *= exp2_fast(change * kLog2E);
  if (sums.count > 0.0f) sums.below += sums.count * change;
  sums.max = max;
}

/* The sums over the 32 lanes, in every lane. */
template <class K>
FASTMP_DEVICE Sums sum_over_warp(Sums sums) {
  float max = sums.max;
  for (int mask = kWarp / 2; mask > 0; mask /= 2) max = larger(max, shuffle_xor(max, mask));
  raise(sums, max);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    sums.others += shuffle_xor(sums.others, mask);
    if constexpr (K::smooth != Smooth::none) {
      sums.below += shuffle_xor(sums.below, mask);
      sums.count += shuffle_xor(sums.count, mask);
    }
  }
  return sums;
}

/* The sums over a row, or half of it, with the logits of its targets. */
struct Totals {
  Sums sums;
  float z_a, z_b;
};

/* Shared memory beside the ring. Rows take its two parts in turn: a warp that is one row ahead
 * writes where no other reads. */
struct Shared {
  Sums warps[2][kWarp];
  float target_logits[2][2];
  Totals halves[2][2];
  Barrier exchange[2];
};
static_assert(sizeof(Shared) <= 1280, "backends/cuda/loss.py leaves so much beside the ring");

/* Exchanges the totals with the other block of the cluster. */
FASTMP_DEVICE Totals sum_over_cluster(const Totals& mine, const Targets& targets, int32_t split,
                                      int32_t rank, int32_t count, Shared& shared) {
  Totals* halves = shared.halves[count & 1];
  const SharedAddress barrier = shared_address(&shared.exchange[count & 1]);
  if (thread() < 2) {
    const float values[] = {mine.sums.max,   mine.sums.others, mine.sums.below,
                            mine.sums.count, mine.z_a,         mine.z_b};
    const SharedAddress to = shared_address(&halves[rank]);
    for (int32_t i = 0; i < 6; ++i) store_in_rank(to + i * sizeof(float), values[i], thread());
    arrive_in_rank(barrier, thread());
  }
  wait_for_cluster(barrier, static_cast<uint32_t>(count / 2) & 1u);
  Totals first = halves[0], second = halves[1];
  const float max = larger(first.sums.max, second.sums.max);
  raise(first.sums, max);
  raise(second.sums, max);
  return {{max, first.sums.others + second.sums.others, first.sums.below + second.sums.below,
           first.sums.count + second.sums.count},
          targets.a < split ? first.z_a : second.z_a,
          targets.b < split ? first.z_b : second.z_b};
}

/* ---- 16 bytes of logits ---- */

typedef Access<16>::Bits Bits;

union Vector {
  Bits bits;
  uint32_t words[4];
};

template <class K>
FASTMP_DEVICE void unpack_vector(const Vector& v, float (&values)[K::vector]) {
  for (int i = 0; i < 4; ++i) {
    if constexpr (K::vector == 4) {
      values[i] = float_from_bits(v.words[i]);
    } else {
      unpack(v.words[i], values[2 * i], values[2 * i + 1], typename K::T());
    }
  }
}

template <class K>
FASTMP_DEVICE Bits pack_vector(const float (&values)[K::vector]) {
  Vector v;
  for (int i = 0; i < 4; ++i) {
    if constexpr (K::vector == 4) {
      v.words[i] = bits_of(values[i]);
    } else {
      v.words[i] = pack(values[2 * i], values[2 * i + 1], typename K::T());
    }
  }
  return v.bits;
}

/* The largest of the values of v, which z has in fp32. */
template <class K>
FASTMP_DEVICE float max_of(const Vector& v, const float (&z)[K::vector]) {
  if constexpr (K::vector == 4) {
    return larger(larger(z[0], z[1]), larger(z[2], z[3]));
  } else {
    typedef typename K::T T;
    float low, high;
    unpack(larger_pair(larger_pair(v.words[0], v.words[1], T()),
                       larger_pair(v.words[2], v.words[3], T()), T()),
           low, high, T());
    return larger(low, high);
  }
}

template <int n>
FASTMP_DEVICE float sum_of(const float (&values)[n]) {
  if constexpr (n == 1) return values[0];
  float pairs[(n + 1) / 2];
  for (int i = 0; i < n / 2; ++i) pairs[i] = values[i] + values[i + n / 2];
  if constexpr (n > 1) return sum_of(pairs);
}

/* Σ w (z - max) of n classes from `at` on; counts their weights. */
template <class K, int n>
FASTMP_DEVICE float weighted_sum(Sums& sums, const float (&below)[n], int32_t at,
                                 const float* weight) {
  if constexpr (K::smooth == Smooth::equal) {
    sums.count += static_cast<float>(n);
    return sum_of(below);
  }
  float terms[n];
  for (int i = 0; i < n; ++i) {
    const float w = read_only(weight + at + i);
    sums.count += w;
    terms[i] = w * below[i];
  }
  return sum_of(terms);
}

template <int n>
FASTMP_DEVICE bool is_among(int32_t y, int32_t at) {
  return static_cast<uint32_t>(y - at) < static_cast<uint32_t>(n);
}

/* Adds the logits of n classes from `at` on, of which the largest is max; keeps those of targets.
 */
template <class K, int n>
FASTMP_DEVICE void add(Sums& sums, float (&z)[n], float max, int32_t at, const float* weight,
                       const Targets& targets, float* target_logits) {
  if (max > sums.max) raise(sums, max);
  const bool has_target = is_among<n>(targets.a, at) || is_among<n>(targets.b, at);
  if (has_target) {
    for (int i = 0; i < n; ++i) {
      if (targets.a == at + i) target_logits[0] = z[i];
      if (targets.b == at + i) target_logits[1] = z[i];
    }
  }
  for (int i = 0; i < n; ++i) z[i] -= sums.max;
  if constexpr (K::smooth != Smooth::none) sums.below += weighted_sum<K>(sums, z, at, weight);
  for (int i = 0; i < n; ++i) z[i] = exp2_fast(z[i] * kLog2E);
  if (has_target) {
    for (int i = 0; i < n; ++i) {
      if (targets.a == at + i || targets.b == at + i) z[i] = 0.0f;
    }
  }
  sums.others += sum_of(z);
}

}  // namespace fastmp
#endif
