/* Sums over a row of the loss: of 16 bytes, of a warp, of a block, of a cluster, in this order. */
#ifndef FASTMP_LOSS_SUMS_H
#define FASTMP_LOSS_SUMS_H

#include "loss_ring.h"

namespace fastmp {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.693147182f;
constexpr float kLowest = -3.402823466e38f; /* finite: -inf - kLowest is -inf, and not NaN */

/* ---- exponentials ---- */

/* e^z = 2^(scale z - offset) 2^distance, the first factor by one multiply_add: for the largest
 * logit z_max, offset = log2(e) z_max is rounded, by up to 64 at 2^30, but the same for all logits.
 * From there on neighbouring fp32 numbers are so far apart that base 2 gives 0 and 1 as base e. */
struct Reference {
  float scale, offset;

  __device__ __forceinline__ float exponent(float z) const {
    return multiply_add(z, scale, -offset);
  }
};

constexpr float kHuge = 1073741824.0f;
/* Exponents that a sum may hold: 2^64 2^20 logits is finite. */
constexpr float kFar = 64.0f;

FASTMP_DEVICE Reference reference_to(float z) {
  const float scale = z < kHuge && z > -kHuge ? kLog2E : 1.0f;
  return {scale, z * scale};
}

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

/* The sums over groups of `lanes` lanes, in each of them; of one maximum. */
template <class K, int lanes>
FASTMP_DEVICE void add_lanes(Sums& sums) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    sums.others += shuffle_xor(sums.others, mask);
    if constexpr (K::smooth != Smooth::none) {
      sums.below += shuffle_xor(sums.below, mask);
      sums.count += shuffle_xor(sums.count, mask);
    }
  }
}

/* The sums over the 32 lanes, in every lane. Before, others = Σ 2^exponent and below = Σ w exponent
 * of a thread's own reference. */
template <class K>
FASTMP_DEVICE Sums sum_over_warp(Sums sums, const Reference& reference) {
  sums.max = max_over_warp(sums.max);
  const float distance = -reference.exponent(sums.max);
  sums.others *= exp2_fast(distance);
  if (sums.count > 0.0f) {
    const float ln_base = reference.scale == 1.0f ? 1.0f : kLn2;
    sums.below = ln_base * multiply_add(sums.count, distance, sums.below);
  }
  add_lanes<K, kWarp>(sums);
  return sums;
}

/* Of all warps, in every lane; a power of two of lanes has them all. */
template <class K>
FASTMP_DEVICE Sums sum_over_warps(const Sums* warps) {
  constexpr int lanes = K::warps > 16 ? 32 : K::warps > 8 ? 16 : K::warps > 4 ? 8 : 4;
  static_assert(K::warps <= kWarp && lanes >= K::warps, "one lane for each");
  const int32_t lane = thread() % min_of(lanes, kWarp);
  Sums sums = lane < K::warps ? warps[lane] : kNothing;
  raise(sums, max_over_warp(sums.max));
  add_lanes<K, min_of(lanes, kWarp)>(sums);
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

/* The largest logit so far; of 16-bit logits in each half of a word. */
template <class T>
struct Top {
  uint32_t pair = lowest_pair(T());

  __device__ __forceinline__ void raise(const Vector& v) {
    pair = larger_pair(larger_pair(pair, v.words[0], T()), v.words[1], T());
    pair = larger_pair(larger_pair(pair, v.words[2], T()), v.words[3], T());
  }
  __device__ __forceinline__ float value() const {
    float low, high;
    unpack(pair, low, high, T());
    return larger(low, high);
  }
};
template <>
struct Top<float> {
  float max = kLowest;

  __device__ __forceinline__ void raise(const Vector& v) {
    for (int i = 0; i < 4; ++i) max = larger(max, float_from_bits(v.words[i]));
  }
  __device__ __forceinline__ float value() const { return max; }
};

template <int n>
FASTMP_DEVICE float sum_of(const float (&values)[n]) {
  if constexpr (n == 1) return values[0];
  float pairs[(n + 1) / 2];
  for (int i = 0; i < n / 2; ++i) pairs[i] = values[i] + values[i + n / 2];
  if constexpr (n > 1) return sum_of(pairs);
}

/* Σ w exponent of n classes from `at` on; counts class weights, if there are any. */
template <class K, int n>
FASTMP_DEVICE float weighted_sum(Sums& sums, const float (&exponents)[n], int32_t at,
                                 const float* weight) {
  if constexpr (K::smooth == Smooth::equal) return sum_of(exponents);
  float terms[n];
  for (int i = 0; i < n; ++i) {
    const float w = read_only(weight + at + i);
    sums.count += w;
    terms[i] = w * exponents[i];
  }
  return sum_of(terms);
}

template <int n>
FASTMP_DEVICE bool is_among(int32_t y, int32_t at) {
  return static_cast<uint32_t>(y - at) < static_cast<uint32_t>(n);
}

/* Adds the logits of n classes from `at` on, and makes them exponentials: 0 for targets, whose
 * logits it keeps. has_targets: whether targets may be among them. */
template <class K, bool has_targets, int n>
FASTMP_DEVICE void add(Sums& sums, const Reference& reference, float (&z)[n], int32_t at,
                       const float* weight, const Targets& targets, float* target_logits) {
  bool found = false;
  if constexpr (has_targets) {
    found = is_among<n>(targets.a, at) || is_among<n>(targets.b, at);
    if (found) {
      for (int i = 0; i < n; ++i) {
        if (targets.a == at + i) target_logits[0] = z[i];
        if (targets.b == at + i) target_logits[1] = z[i];
      }
    }
  }
  for (int i = 0; i < n; ++i) z[i] = reference.exponent(z[i]);
  if constexpr (K::smooth != Smooth::none) sums.below += weighted_sum<K>(sums, z, at, weight);
  for (int i = 0; i < n; ++i) z[i] = exp2_fast(z[i]);
  if (found) {
    for (int i = 0; i < n; ++i) {
      if (targets.a == at + i || targets.b == at + i) z[i] = 0.0f;
    }
  }
  sums.others += sum_of(z);
}

}  // namespace fastmp
#endif
