// The most multiply-adds this machine can do: chains of independent ones that never leave the
// registers. Compiled for the machine it runs on by peak.py, which runs it on every thread at once.
#include <stdint.h>

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
constexpr int kChains = 24;  // up to 6 cycles of latency times 2 a cycle, and as many to spare

template <class Step>
static double run(int64_t rounds, Vec a, Vec b, const Step& step) {
  Vec sums[kChains];  // of different values: equal chains would be merged
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sums[i] = a * (1.0f + i);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sums[i] = step(sums[i], a, b);
  }
  double total = 0;
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) total += sums[i][0];
  return total;
}

// Operations a round; 0: this CPU has no such instruction.
extern "C" int64_t peak_operations(int32_t bf16) {
#if !defined(__AVX512BF16__)
  if (bf16) return 0;
#endif
  return kChains * kWidth * (bf16 ? 4 : 2);
}

extern "C" double peak_run(int32_t bf16, int64_t rounds, float value) {
  const Vec v = value - Vec{};
#if defined(__AVX512BF16__)
  if (bf16) {
    return run(rounds, v, v, [](Vec s, Vec a, Vec b) {
      return (Vec)_mm512_dpbf16_ps((__m512)s, (__m512bh)a, (__m512bh)b);
    });
  }
#endif
  return run(rounds, v, v, [](Vec s, Vec a, Vec b) { return s * a + b; });
}
