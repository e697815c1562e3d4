/* How products and activations write bf16. */
#ifndef FASTMP_STORE_BF16_H
#define FASTMP_STORE_BF16_H

#include "vec.h"

namespace fastmp {
namespace FASTMP_TARGET {

#if defined(__AVX512BF16__)
/* One instruction instead of eleven. Subnormal values become 0, as they do in the products. */
template <>
inline void save_lanes<bf16>(Vec v, bf16* p, int64_t n) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  if (n >= kWidth) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  } else {
    _mm256_mask_storeu_epi16(p, first_lanes(n), half);
  }
}
#endif

}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
