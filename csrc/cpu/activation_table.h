/* Values and derivatives of the activations for every 16-bit input, looked up instead of computed.
 *
 * A 16-bit type has 65,536 values. A look-up takes three instructions an element on any instruction
 * set; gelu's arithmetic takes 3 with AVX-512, among them a division, and 6 or more with less. In
 * the second-level cache of an AMD Zen 5 (2026-11), bf16, ns an element and thread:
 *
 *   gelu        0.36 by arithmetic, 0.18 by table, torch 0.21
 *   its gradient 0.54, 0.25, 0.41
 *
 * Eight binary orders of magnitude and both signs, which hold nearly all outputs of a layer, are 4
 * KB of values in bf16 and 32 KB in fp16: they stay in the first-level cache.
 *
 * A table is made by the arithmetic of activation.h, at the first call that is large enough, in 25
 * us: both routes give the same bits, but for those of a NaN. It lives as long as the process: 128
 * KB of values, 256 KB of derivatives, which are fp32 because their product with grad is rounded
 * once. */
#ifndef FASTMP_ACTIVATION_TABLE_H
#define FASTMP_ACTIVATION_TABLE_H

#include "activation.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

constexpr int64_t kPatterns = 65536;
/* Elements from which on a call looks up: fewer take 1.5 us by arithmetic. */
constexpr int64_t kWorthATable = 4096;

template <class T, class Act>
constexpr bool kHasTable = sizeof(T) == 2 && Act::kExpensive;

/* The table that `fill` makes, made once, or null without memory. Of two threads that come first
 * both make it, and one frees its own. */
template <class Entry, class Fill>
const Entry* made_once(Entry*& table, const Fill& fill) {
  Entry* made = __atomic_load_n(&table, __ATOMIC_ACQUIRE);
  if (made != nullptr) return made;
  Scratch<Entry> entries(kPatterns);
  if (entries.data == nullptr) return nullptr;
  fill(entries.data);
  if (__atomic_compare_exchange_n(&table, &made, entries.data, false, __ATOMIC_ACQ_REL,
                                  __ATOMIC_ACQUIRE)) {
    made = entries.data;
    entries.data = nullptr;
  }
  return made;
}

/* 16 bytes of entries, table[z], by insertions. AVX-512's gather takes twice as long on a Zen 5. */
template <class Entry>
struct Lookup {
  typedef Entry Lanes __attribute__((vector_size(16)));
  static constexpr int64_t kLanes = 16 / sizeof(Entry);
  template <class T>
  static Lanes of(const Entry* table, const T* z) {
    Lanes found = {};
#pragma GCC unroll 8
    for (int64_t lane = 0; lane < kLanes; ++lane) found[lane] = table[z[lane].bits];
    return found;
  }
};

/* table[z] of kWidth values. */
template <class T>
inline Vec look_up(const float* table, const T* z) {
  const auto quad = [&](int64_t i) { return Lookup<float>::of(table, z + 4 * i); };
#if defined(__AVX512F__)
  __m512 found = _mm512_castps128_ps512((__m128)quad(0));
  found = _mm512_insertf32x4(found, (__m128)quad(1), 1);
  found = _mm512_insertf32x4(found, (__m128)quad(2), 2);
  return (Vec)_mm512_insertf32x4(found, (__m128)quad(3), 3);
#elif defined(__AVX2__)
  return (Vec)_mm256_set_m128((__m128)quad(1), (__m128)quad(0));
#else
  return quad(0);
#endif
}

/* y = table[z] of n values; y may be z. */
template <class T>
void look_up_range(const T* table, const T* z, T* y, int64_t n) {
  typedef Lookup<uint16_t> Octet;
  int64_t i = 0;
  for (; i + Octet::kLanes <= n; i += Octet::kLanes) {
    const auto found = Octet::of(&table->bits, z + i);
    memcpy(y + i, &found, sizeof found);
  }
  for (; i < n; ++i) y[i] = table[z[i].bits];
}

/* act(z) for z of every bit pattern; null for fewer than kWorthATable elements. */
template <class T, class Act>
const T* value_table(int64_t n) {
  static T* table = nullptr;
  if (n < kWorthATable) return nullptr;
  return made_once(table, [](T* entries) {
    for (int64_t i = 0; i < kPatterns; ++i) entries[i].bits = static_cast<uint16_t>(i);
    for (int64_t i = 0; i < kPatterns; i += kWidth) {
      save_lanes(Act::value(load(entries + i)), entries + i, kWidth);
    }
  });
}

/* act'(z) likewise. */
template <class T, class Act>
const float* derivative_table(int64_t n) {
  static float* table = nullptr;
  if (n < kWorthATable) return nullptr;
  return made_once(table, [](float* entries) {
    T z[kWidth];
    for (int64_t i = 0; i < kPatterns; i += kWidth) {
      for (int64_t lane = 0; lane < kWidth; ++lane) z[lane].bits = static_cast<uint16_t>(i + lane);
      save(Act::gradient(broadcast(1.0f), load(z)), entries + i);
    }
  });
}

}  // namespace
}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
