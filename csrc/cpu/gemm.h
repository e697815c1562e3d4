/* gemm: C = A B with fp32 accumulation, for operands of 16 bits or fp32.
 *
 * 2 M N K operations; A and B are read from memory about once each, C is written once. Blocks of A
 * and panels of B are copied ("packed") into the order in which the innermost loop reads them, and
 * converted on the way, so that fp16 runs at the speed of fp32:
 *
 *   A  blocks of kBlockM rows and kBlockSteps steps, in panels of kTileM rows   [panel][step][m]
 *   B  panels of kTileN columns and kBlockSteps steps                          [step][n]
 *
 * The innermost loop keeps a tile of kTileM x kTileN sums in registers. A step loads kTileVectors
 * vectors of B and broadcasts kTileM values of A for kTileM x kTileVectors multiply-adds: with
 * AVX-512 16 loads for 28. A panel of B (128 KiB) stays in the second-level cache while all of A's
 * block (4 MiB, third level) passes by. (After Goto and van de Geijn 2008,
 * Anatomy of High-Performance Matrix Multiplication.)
 *
 * Every element is summed in one order of k for any number of threads: two runs give the same bits.
 * Subnormal bf16 inputs count as 0 where VDPBF16PS multiplies, as they do in oneDNN.
 *
 * Why fp16 is widened: every finite fp16 number is also a sum of two bf16 numbers, and three bf16
 * products give the fp16 product. But that is 1.5 VDPBF16PS for one FMA, and both run at one
 * 512-bit instruction a cycle on a Zen 4 (Intel: one and two). At best 154 GFLOP/s of bf16 against
 * 230 of FMA on 2 cores (2026-11); through oneDNN's bf16 130, by this loop 210. It would pay with
 * AMX. Why no library: oneDNN 3.2 from PyPI (onednn-cpu-gomp) has no fp16 product without
 * AVX512-FP16, that of 2026.1 (onednn-devel) needs the SYCL runtime, and torch's, 3.12, reaches 30
 * GFLOP/s. */
#ifndef FASTMP_GEMM_H
#define FASTMP_GEMM_H

#include <utility>

#include "store_bf16.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kTileM = 14; /* 28 sums, 2 vectors of B, 1 of A: 31 of 32 registers */
#elif defined(__AVX2__)
constexpr int64_t kTileM = 6; /* 12 sums, 2 vectors of B, 1 of A: 15 of 16 registers */
#else
constexpr int64_t kTileM = 4;
#endif
constexpr int64_t kTileVectors = 2;
constexpr int64_t kTileN = kTileVectors * kWidth;
constexpr int64_t kBlockSteps = 1024; /* a step is one k, or two */
constexpr int64_t kBlockM = ceil_div(1024, kTileM) * kTileM;

/* A matrix that is contiguous along k or along its other dimension. */
template <class T>
struct Operand {
  const T* data;
  int64_t stride;   /* from one row of A, or column of B, to the next */
  int64_t k_stride; /* from one k to the next; one of the two is 1 */
  Operand from(int64_t row, int64_t k) const {
    return {data + row * stride + k * k_stride, stride, k_stride};
  }
};

/* One step of the innermost loop on operands of type T: one k, widened to fp32. */
template <class T>
struct Step {
  static constexpr int64_t kPerStep = 1;
  /* fp32: 128 has the error of MKL. 16 bits: rounding the result costs 100 times the error of a
   * chain of 1024. */
  static constexpr int64_t kChain = sizeof(T) == sizeof(float) ? 128 : kBlockSteps;
  /* `lanes` rows of A or columns of B at one k, where they are contiguous. */
  static Vec across(const T* p, int64_t, int64_t, int64_t lanes) {
    if (lanes >= kWidth) return load(p);
    return lanes > 0 ? load_part(p, lanes, 0.0f) : Vec{};
  }
  /* k values of one row of A or column of B, one per lane. */
  static Vec along(const T* p, int64_t k) { return across(p, 0, 0, k); }
  static Vec multiply_add(Vec sum, float a, Vec b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
/* Two k: a lane is a pair of bf16, and one instruction multiplies and adds both. */
template <>
struct Step<bf16> {
  static constexpr int64_t kPerStep = 2;
  static constexpr int64_t kChain = kBlockSteps;
  static Vec across(const bf16* p, int64_t k_stride, int64_t k, int64_t lanes) {
    if (lanes <= 0) return Vec{};
    const __mmask16 mask = lanes >= kWidth ? 0xffff : first_lanes(lanes);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    if (k < 2) return (Vec)low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + k_stride));
    return (Vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static Vec along(const bf16* p, int64_t k) {
    if (k >= 2 * kWidth) return (Vec)_mm512_loadu_si512(p);
    const __mmask32 mask = k <= 0 ? 0 : (1u << static_cast<unsigned>(k)) - 1u;
    return (Vec)_mm512_maskz_loadu_epi16(mask, p);
  }
  static Vec multiply_add(Vec sum, float a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)broadcast(a), (__m512bh)b);
  }
};
#endif

template <class T>
constexpr int64_t steps_of(int64_t k) {
  return ceil_div(k, Step<T>::kPerStep);
}

/* ---- packing ---- */

/* Lanes of two vectors side by side, by index. clang has no __builtin_shuffle, GCC 11 no
 * __builtin_shufflevector. */
template <int64_t... kLanes>
inline Vec lanes_of(Vec a, Vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kLanes...);
#else
  return __builtin_shuffle(a, b, UVec{kLanes...});
#endif
}

/* Exchanges blocks of kStride x kStride: one of the log2(kWidth) stages of a transposition. */
template <int64_t kStride, int64_t... kLane>
inline void exchange(Vec (&rows)[kWidth], std::integer_sequence<int64_t, kLane...>) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kWidth; ++i) {
    if (i & kStride) continue;
    const Vec a = rows[i], b = rows[i + kStride];
    rows[i] = lanes_of<(kLane & kStride ? kWidth + kLane - kStride : kLane)...>(a, b);
    rows[i + kStride] = lanes_of<(kLane & kStride ? kWidth + kLane : kLane + kStride)...>(a, b);
  }
}
inline void transpose(Vec (&rows)[kWidth]) {
  constexpr auto lanes = std::make_integer_sequence<int64_t, kWidth>();
  exchange<1>(rows, lanes);
  exchange<2>(rows, lanes);
  if constexpr (kWidth > 4) exchange<4>(rows, lanes);
  if constexpr (kWidth > 8) exchange<8>(rows, lanes);
}

/* Stores the floats from w on of one step of a panel. Only the last step needs a masked store: past
 * the end of any other, the next step overwrites the surplus. */
template <int64_t kPanel>
inline void save_panel(Vec v, float* to, int64_t w, bool last) {
  if (kPanel - w >= kWidth || !last) {
    save(v, to + w);
  } else {
    save_part(v, to + w, kPanel - w);
  }
}

/* kGroup steps at a time for all panels: a cache line holds values of two panels or more. Every k
 * lies on another page, where the hardware does not prefetch. */
template <class T, int64_t kPanel>
void pack_across(const Operand<T>& from, int64_t width, int64_t k, float* to) {
  constexpr int64_t kGroup = 8, kAhead = 8, kPerStep = Step<T>::kPerStep;
  const int64_t steps = steps_of<T>(k);
  for (int64_t group = 0; group < steps; group += kGroup) {
    const int64_t group_end = min_of(group + kGroup, steps);
    for (int64_t first = 0; first < width; first += kPanel) {
      float* panel = to + first * steps;
      for (int64_t s = group; s < group_end; ++s) {
        const T* p = from.data + s * kPerStep * from.k_stride + first;
        for (int64_t i = 0; i < kPerStep; ++i) {
          __builtin_prefetch(p + (kAhead + i) * from.k_stride);
        }
#pragma GCC unroll 2
        for (int64_t w = 0; w < kPanel; w += kWidth) {
          const Vec v = Step<T>::across(p + w, from.k_stride, k - s * kPerStep, width - first - w);
          save_panel<kPanel>(v, panel + s * kPanel, w, s == steps - 1);
        }
      }
    }
  }
}

template <class T, int64_t kPanel>
void pack_along(const Operand<T>& from, int64_t width, int64_t k, float* to) {
  const int64_t steps = steps_of<T>(k);
  for (int64_t first = 0; first < width; first += kPanel) {
    float* panel = to + first * steps;
    for (int64_t w = 0; w < kPanel; w += kWidth) {
      const T* p = from.data + (first + w) * from.stride;
      const int64_t lanes = min_of(width - first - w, kWidth);
      for (int64_t s = 0; s < steps; s += kWidth) {
        Vec rows[kWidth];
        const int64_t at = s * Step<T>::kPerStep;
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i) {
          rows[i] = i < lanes ? Step<T>::along(p + i * from.stride + at, k - at) : Vec{};
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i) {
          const int64_t step = s + i;
          if (step < steps) {
            save_panel<kPanel>(rows[i], panel + step * kPanel, w, step == steps - 1);
          }
        }
      }
    }
  }
}

/* `width` rows of A or columns of B and k of their values, as panels of [step][kPanel]. Lanes
 * beyond width are undefined or 0, values beyond k are 0. */
template <class T, int64_t kPanel>
void pack(const Operand<T>& from, int64_t width, int64_t k, float* to) {
  if (from.stride == 1) {
    pack_across<T, kPanel>(from, width, k, to);
  } else {
    pack_along<T, kPanel>(from, width, k, to);
  }
}

/* Prefetches parts [begin, end) of n equal parts of the next call of pack(). Right after an
 * optimizer step no weight is in a cache: 2% of a product of 256 rows. */
template <class T>
void prefetch(const Operand<T>& from, int64_t width, int64_t k, int64_t begin, int64_t end,
              int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const bool across = from.stride == 1;
  const int64_t stride = across ? from.k_stride : from.stride;
  const int64_t ranges = across ? k : width, length = across ? width : k;
  for (int64_t r = ranges * begin / n; r < ranges * end / n; ++r) {
    for (int64_t at = 0; at < length; at += kLine) {
      __builtin_prefetch(from.data + r * stride + at, 0, 2);
    }
  }
}

/* ---- one tile ---- */

/* tile[i][j] (+)= the sum over `steps` of a[step][i] b[step][j], for the first kHeight rows. */
template <class T, int64_t kHeight>
void multiply(int64_t steps, const float* a, const float* b, bool add, float* tile) {
  constexpr int64_t kAhead = 512; /* floats of A, which comes from the third level: 4% */
  Vec sums[kHeight][kTileVectors];
  const auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kHeight; ++i) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < kTileVectors; ++j) {
        body(sums[i][j], i, j, tile + i * kTileN + j * kWidth);
      }
    }
  };
  each([](Vec& sum, int64_t, int64_t, const float*) { sum = Vec{}; });
  for (int64_t s = 0; s < steps; ++s) {
    Vec b_step[kTileVectors];
#pragma GCC unroll 2
    for (int64_t j = 0; j < kTileVectors; ++j) b_step[j] = load(b + j * kWidth);
    each([&](Vec& sum, int64_t i, int64_t j, const float*) {
      sum = Step<T>::multiply_add(sum, a[i], b_step[j]);
    });
    __builtin_prefetch(a + kAhead);
    a += kTileM;
    b += kTileN;
  }
  if (add) each([](Vec& sum, int64_t, int64_t, const float* at) { sum += load(at); });
  each([](const Vec& sum, int64_t, int64_t, float* at) { save(sum, at); });
}

/* multiply() for any number of rows, each with a loop of its own, and of steps, in chains of
 * kChain: sums of sums keep more of fp32 than one long sum. */
template <class T, int64_t kHeight = kTileM>
void multiply_rows(int64_t rows, int64_t steps, const float* a, const float* b, bool add,
                   float* tile) {
  if constexpr (kHeight > 1) {
    if (rows < kHeight) return multiply_rows<T, kHeight - 1>(rows, steps, a, b, add, tile);
  }
  constexpr int64_t kChain = Step<T>::kChain;
  int64_t s = 0;
  do {
    multiply<T, kHeight>(min_of(steps - s, kChain), a + s * kTileM, b + s * kTileN, add || s > 0,
                         tile);
    s += kChain;
  } while (s < steps);
}

/* ---- the loops around it ---- */

/* Rows [row, row_end) and columns [column, column_end) of C. */
struct Part {
  int64_t row, row_end, column, column_end;
};

/* One part of C on one thread. finish(tile, part of C) takes the finished sums of a tile, fp32,
 * kTileN from one row to the next. lower: tiles above the diagonal are left out. False: no memory.
 */
template <class T, class Finish>
bool multiply_part(const Operand<T>& a, const Operand<T>& b, int64_t k_total, const Part& part,
                   const Finish& finish, bool lower = false) {
  constexpr int64_t kTile = kTileM * kTileN, kBlockK = kBlockSteps * Step<T>::kPerStep;
  const int64_t row_panels = ceil_div(min_of(part.row_end - part.row, kBlockM), kTileM);
  const int64_t column_panels = ceil_div(part.column_end - part.column, kTileN);
  const int64_t max_steps = steps_of<T>(min_of(k_total, kBlockK));
  const bool one_block = k_total <= kBlockK; /* else every tile keeps its sums between blocks */
  Scratch<float> a_panels(row_panels * kTileM * max_steps);
  Scratch<float> b_panel(kTileN * max_steps);
  Scratch<float> tiles(one_block ? kTile : row_panels * column_panels * kTile);
  if (a_panels.data == nullptr || b_panel.data == nullptr || tiles.data == nullptr) return false;
  for (int64_t row = part.row; row < part.row_end; row += kBlockM) {
    const int64_t row_end = min_of(row + kBlockM, part.row_end);
    for (int64_t k = 0; k == 0 || k < k_total; k += kBlockK) {
      const int64_t block_k = min_of(k_total - k, kBlockK), steps = steps_of<T>(block_k);
      pack<T, kTileM>(a.from(row, k), row_end - row, block_k, a_panels.data);
      float* tile = tiles.data;
      for (int64_t column = part.column; column < part.column_end; column += kTileN) {
        const int64_t column_end = min_of(column + kTileN, part.column_end);
        pack<T, kTileN>(b.from(column, k), column_end - column, block_k, b_panel.data);
        const int64_t next = min_of(column_end + kTileN, part.column_end) - column_end;
        for (int64_t r = row; r < row_end; r += kTileM) {
          const int64_t r_end = min_of(r + kTileM, row_end);
          if (lower && r_end <= column) {
            if (!one_block) tile += kTile;
            continue;
          }
          prefetch(b.from(column_end, k), next, block_k, r - row, r_end - row, row_end - row);
          multiply_rows<T>(r_end - r, steps, a_panels.data + (r - row) * steps, b_panel.data, k > 0,
                           tile);
          if (k + block_k == k_total) finish(tile, Part{r, r_end, column, column_end});
          if (!one_block) tile += kTile;
        }
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
