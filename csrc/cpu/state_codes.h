/* Whole blocks of narrow states in AVX-512, to the bit as state_kinds.h defines them. Plain loops
 * serve the rest of a row and the other instruction sets.
 *
 * With 8 bits AdamW moves 16.1 bytes an element instead of 28, and has the time of 12 for
 * arithmetic: 0.2 ns on a core that moves 55 GB/s. In cache, on a Zen 5, a step takes (ns an
 * element; with fp32 moments 0.14, of which root and division are 0.11):
 *   8 bits  0.67 in the plain loops, 0.40 here
 *   bf16    0.31 in the plain loops, 0.21 here
 * Vector instructions for 16 elements of a state:
 *   8 bits, read   3.5 of a square, 4 with a sign. A code is a number in fp16's format, subnormal
 *                  ones too: the instruction that widens fp16 widens it.
 *   8 bits, write  8 and 8.5. 32 bits up to the rounding; words of 16 bits below, where their
 *                  packing bounds the codes.
 *   scales         4.5. Four blocks are reduced together. All scales are found before the first
 *                  code is: hashing the random words hides their chain.
 *   bf16, write    3.5
 *   random words   6, for all states */
#ifndef FASTMP_STATE_CODES_H
#define FASTMP_STATE_CODES_H

#include "../common/state_kinds.h"
#include "vec.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

constexpr int64_t kBlock = 128; /* elements staged in L1 as fp32: 512 bytes a stream */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

constexpr int kScales = kBlock / State8Bit::block; /* of a kBlock */
static_assert(kScales == 4 && State8Bit::block == 32 && State8Bit::dropped == 19, "layout below");
typedef uint32_t ScaleVec __attribute__((vector_size(kScales * sizeof(uint32_t))));

inline __m512i load_bits(const void* p) {
  return _mm512_loadu_si512(p);
}
inline __m512i broadcast_bits(uint32_t bits) {
  return _mm512_set1_epi32(static_cast<int>(bits));
}
inline __m512i magnitude_at(const float* values) {
  return _mm512_and_si512(load_bits(values), broadcast_bits(0x7fffffffu));
}

/* ---- random words ---- */

/* Those of kBlock elements, from a group on. A lane of 128 bits has the groups of one element in
 * four, so that a shuffle within lanes hands each its group. */
inline void random_words(const RandomKey& key, uint32_t group, uint32_t* words) {
  UVec factors;
  for (int e = 0; e < kWidth; ++e) factors[e] = random_factor(e); /* a constant */
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (uint32_t at = 0; at < kBlock / kRandomGroup; at += 16) {
    const UVec hash = random_hash(key, (UVec)lanes + (group + at));
    const __m512i spread[] = {
        _mm512_maskz_shuffle_epi32(0xffff, (__m512i)hash, _MM_PERM_AAAA),
        _mm512_maskz_shuffle_epi32(0xffff, (__m512i)hash, _MM_PERM_BBBB),
        _mm512_maskz_shuffle_epi32(0xffff, (__m512i)hash, _MM_PERM_CCCC),
        _mm512_maskz_shuffle_epi32(0xffff, (__m512i)hash, _MM_PERM_DDDD),
    };
    for (uint32_t i = 0; i < 4; ++i) {
      const UVec word = finish_word((UVec)spread[i] * factors);
      _mm512_storeu_si512(words + kRandomGroup * at + 16 * i, (__m512i)word);
    }
  }
}

template <int dropped, int s>
inline __m512i rounding_bits(const uint32_t* words) {
  return (__m512i)bits_for_state<dropped>((UVec)load_bits(words), s);
}

/* ---- bf16 ---- */

/* A rule on the elements of a vector. GCC keeps the arrays in registers. */
template <class Rule>
FASTMP_FN void apply_to(Vec& p, Vec g, Vec* states, const typename Rule::Coefficients& k) {
  float master[kWidth], grad[kWidth], values[3][kWidth];
  save(p, master);
  save(g, grad);
  for (int s = 0; s < 3; ++s) save(states[s], values[s]);
  Ieee arithmetic;
  for (int64_t i = 0; i < kWidth; ++i) {
    Rule::apply(master[i], grad[i], values[0][i], values[1][i], values[2][i], k, arithmetic);
  }
  p = load(master);
  for (int s = 0; s < 3; ++s) states[s] = load(values[s]);
}

/* 32 values that are a maximum, or among which one is not finite. */
template <Quantity quantity, int s>
__attribute__((noinline)) void write_bf16_plain(Vec low, Vec high, const uint32_t* words,
                                                bf16* items) {
  float values[2 * kWidth];
  save(low, values);
  save(high, values + kWidth);
  for (int64_t i = 0; i < 2 * kWidth; ++i) {
    const uint32_t bits = bits_for_state<StateBf16::dropped>(words[i], s);
    items[i] = StateBf16::store<quantity>(values[i], bits, 0u);
  }
}

template <class Rule, int s>
FASTMP_FN void write_bf16(const Vec (*values)[3], const uint32_t* words, bf16* const* items,
                          int64_t at) {
  if constexpr (s < Rule::states) {
    constexpr Quantity quantity = Rule::quantity(s);
    constexpr int kSpecial = 0x99; /* NaN, quiet and signalling, inf and -inf */
    const Vec low = values[0][s], high = values[1][s];
    const int special = _mm512_fpclass_ps_mask((__m512)low, kSpecial) |
                        _mm512_fpclass_ps_mask((__m512)high, kSpecial);
    if (quantity == Quantity::kMaximum || special != 0) {
      write_bf16_plain<quantity, s>(low, high, words + at, items[s] + at);
      return;
    }
    const __m512i below[] = {rounding_bits<StateBf16::dropped, s>(words + at),
                             rounding_bits<StateBf16::dropped, s>(words + at + kWidth)};
    const __m512i rounded = upper_halves(_mm512_add_epi32((__m512i)low, below[0]),
                                         _mm512_add_epi32((__m512i)high, below[1]));
    _mm512_storeu_si512(items[s] + at, rounded);
  }
}

/* kBlock elements through a rule, whose bf16 states do not leave the registers: through L1 it takes
 * 0.28 ns an element in cache instead of 0.20. */
template <class Rule>
bool apply_bf16(float* __restrict master, const float* __restrict grad, bf16* const* items,
                const uint32_t* words, const typename Rule::Coefficients& coefficients) {
  const typename Rule::Coefficients k = coefficients; /* a copy: nothing below can alias it */
  for (int64_t at = 0; at < kBlock; at += 2 * kWidth) {
    Vec values[2][3] = {};
    for (int h = 0; h < 2; ++h) {
      const int64_t first = at + kWidth * h;
      for (int s = 0; s < Rule::states; ++s) values[h][s] = load(items[s] + first);
      Vec p = load(master + first);
      apply_to<Rule>(p, load(grad + first), values[h], k);
      save(p, master + first);
    }
    write_bf16<Rule, 0>(values, words, items, at);
    write_bf16<Rule, 1>(values, words, items, at);
    write_bf16<Rule, 2>(values, words, items, at);
  }
  return true;
}

/* ---- 8 bits ---- */

/* False, with the values unfinished, if a scale stands for NaN, or is so large that the factor
 * would be infinite. */
template <Quantity quantity>
inline bool read_codes(const uint8_t* codes, const uint8_t* scales, float* values) {
  constexpr float kRange = 0x1p14f; /* a code of 16 is U, and 2^-14 in fp16 */
  int32_t packed;
  memcpy(&packed, scales, sizeof packed);
  const __m128i scale = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(packed));
  if (_mm_cmpgt_epu32_mask(scale, _mm_set1_epi32(254 - 14)) != 0) return false;
  alignas(16) float factors[kScales];
  _mm_store_ps(factors, (__m128)_mm_slli_epi32(scale, 23) * kRange);
  for (int b = 0; b < kScales; ++b) {
    const __m256i bytes =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + State8Bit::block * b));
    __m512i halves;
    if constexpr (quantity == Quantity::kSigned) {
      const __m512i extended = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 6);
      halves = _mm512_and_si512(extended, _mm512_set1_epi16(static_cast<int16_t>(0x9fc0)));
    } else {
      halves = _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 6);
    }
    const Vec factor = broadcast(factors[b]);
    const Vec low = (Vec)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    const Vec high = (Vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    save(low * factor, values + State8Bit::block * b);
    save(high * factor, values + State8Bit::block * b + kWidth);
  }
  return true;
}

/* The largest magnitudes of the blocks, as bits. */
inline ScaleVec largest_of_blocks(const float* values) {
  __m512i m[kScales];
  for (int b = 0; b < kScales; ++b) {
    const float* block = values + State8Bit::block * b;
    m[b] = _mm512_max_epi32(magnitude_at(block), magnitude_at(block + kWidth));
  }
  const __m512i m01 =
      _mm512_max_epi32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
  const __m512i m23 =
      _mm512_max_epi32(_mm512_unpacklo_epi32(m[2], m[3]), _mm512_unpackhi_epi32(m[2], m[3]));
  const __m512i lanes =
      _mm512_max_epi32(_mm512_unpacklo_epi64(m01, m23), _mm512_unpackhi_epi64(m01, m23));
  const __m256i halves =
      _mm256_max_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
  return (ScaleVec)_mm_max_epi32(_mm256_castsi256_si128(halves),
                                 _mm256_extracti128_si256(halves, 1));
}

/* In memory: broadcasting from there takes no vector instruction. */
struct BlockScales {
  alignas(16) uint32_t base[kScales];   /* U / 2, as bits */
  alignas(16) uint32_t places[kScales]; /* what the base is in units of a code, in both halves */
  uint32_t bytes;                       /* the scales themselves */
  uint32_t live; /* eight bits for each block: 0 where zeros or values that are not finite make
                    every code 0 */
};

template <Quantity quantity>
inline BlockScales scales_of_blocks(const float* values) {
  const ScaleVec scale = State8Bit::scale_of<quantity>(largest_of_blocks(values));
  const ScaleVec base = (scale - 1u) << 23;
  const ScaleVec place = base >> State8Bit::dropped;
  const ScaleVec places = place | place << 16;
  const __mmask8 live = _mm_cmplt_epu32_mask((__m128i)(scale - 1u), _mm_set1_epi32(254));
  BlockScales scales;
  memcpy(scales.base, &base, sizeof base);
  memcpy(scales.places, &places, sizeof places);
  scales.bytes = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_cvtepi32_epi8((__m128i)scale)));
  scales.live = _pdep_u32(live, 0x01010101u) * 0xffu;
  return scales;
}

/* The codes of a block without their signs, 16 bits each: those of its first 16 elements are the
 * lower half of each lane of 128 bits. One may be above the largest by one. */
template <Quantity quantity, int s>
inline __m512i code_words(const float* values, const uint32_t* words, const BlockScales& scales,
                          int b) {
  const Vec base = broadcast(float_from_bits(scales.base[b]));
  __m512i rounded[2];
  for (int h = 0; h < 2; ++h) {
    const int64_t at = State8Bit::block * b + kWidth * h;
    const __m512i magnitude = magnitude_at(values + at);
    const Vec half = multiply_add((Vec)magnitude, broadcast(0.5f), base);
    const __m512i below = quantity == Quantity::kMaximum
                              ? broadcast_bits(1u << (State8Bit::dropped - 1))
                              : rounding_bits<State8Bit::dropped, s>(words + at);
    /* Numbers that are not negative order as their bits do. */
    const __m512i larger = _mm512_max_epi32(magnitude, (__m512i)half);
    rounded[h] = _mm512_srli_epi32(_mm512_add_epi32(larger, below), State8Bit::dropped);
  }
  return _mm512_sub_epi16(_mm512_packus_epi32(rounded[0], rounded[1]),
                          broadcast_bits(scales.places[b]));
}

/* True: there is no block that it cannot write. */
template <Quantity quantity, int s>
inline bool write_codes(const float* values, const uint32_t* words, const BlockScales& block_scales,
                        uint8_t* codes, uint8_t* scales) {
  memcpy(scales, &block_scales.bytes, kScales);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int b = 0; b < kScales; b += 2) {
    const __m512i first = code_words<quantity, s>(values, words, block_scales, b);
    const __m512i second = code_words<quantity, s>(values, words, block_scales, b + 1);
    __m512i packed;
    if constexpr (quantity == Quantity::kSigned) {
      const float* at = values + State8Bit::block * b;
      const __m512i signs =
          _mm512_packs_epi16(_mm512_packs_epi32(load_bits(at), load_bits(at + 16)),
                             _mm512_packs_epi32(load_bits(at + 32), load_bits(at + 48)));
      constexpr int kFirstOrMasked = 0xf8; /* a | b & c */
      packed = _mm512_ternarylogic_epi32(_mm512_packs_epi16(first, second), signs,
                                         broadcast_bits(0x80808080u), kFirstOrMasked);
    } else {
      packed = _mm512_max_epu8(_mm512_packus_epi16(first, second), _mm512_set1_epi8(1));
    }
    const __mmask16 live = static_cast<__mmask16>(block_scales.live >> (8 * b));
    _mm512_storeu_si512(codes + State8Bit::block * b,
                        _mm512_maskz_permutexvar_epi32(live, order, packed));
  }
  return true;
}

#else /* every block is left to the plain loops */

struct BlockScales {};
template <Quantity>
inline BlockScales scales_of_blocks(const float*) {
  return {};
}
template <Quantity>
inline bool read_codes(const uint8_t*, const uint8_t*, float*) {
  return false;
}
template <Quantity, int s>
inline bool write_codes(const float*, const uint32_t*, const BlockScales&, uint8_t*, uint8_t*) {
  return false;
}
template <class Rule>
inline bool apply_bf16(float*, const float*, bf16* const*, const uint32_t*,
                       const typename Rule::Coefficients&) {
  return false;
}
inline void random_words(const RandomKey& key, uint32_t group, uint32_t* words) {
  for (int64_t i = 0; i < kBlock; i += kRandomGroup) {
    const uint32_t hash = random_hash(key, group + static_cast<uint32_t>(i / kRandomGroup));
    for (int e = 0; e < kRandomGroup; ++e) words[i + e] = random_word(hash, e);
  }
}

#endif

}  // namespace
}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
