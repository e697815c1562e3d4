/* gemm: C = A B with fp32 accumulation, for operands of 16 bits or fp32.
 *
 * 2 M N K operations; A and B are read from memory about once each, C is written once. Blocks of A
 * and panels of B are copied ("packed") into the order in which the innermost loop reads them, and
 * converted on the way, so that fp16 runs at the speed of fp32:
 *
 *   A  blocks of kRows rows, kSteps deep, in panels of kTileRows rows    [panel][step][row]
 *   B  panels of kTileColumns columns, kSteps deep                       [step][column]
 *
 * The innermost loop keeps a tile of kTileRows x kTileColumns sums in registers. A step loads
 * kTileVectors vectors of B and broadcasts kTileRows values of A for kTileRows x kTileVectors
 * multiply-adds: with AVX-512 16 loads for 28. A panel of B (128 KiB) stays in the second-level
 * cache while all of A's block (4 MiB, third level) passes by. (After Goto and van de Geijn 2008,
 * Anatomy of High-Performance Matrix Multiplication.)
 *
 * Every element is summed in the same order of k, whatever the number of threads: two runs give the
 * same bits. Subnormal bf16 inputs count as 0 where VDPBF16PS multiplies, as they do in oneDNN.
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

#include "vec.h"

namespace fastmp {
namespace FASTMP_TARGET {

#if defined(__AVX512F__)
constexpr int64_t kTileRows = 14; /* 28 sums, 2 vectors of B, 1 of A: 31 of 32 registers */
#elif defined(__AVX2__)
constexpr int64_t kTileRows = 6; /* 12 sums, 2 vectors of B, 1 of A: 15 of 16 registers */
#else
constexpr int64_t kTileRows = 4;
#endif
constexpr int64_t kTileVectors = 2;
constexpr int64_t kTileColumns = kTileVectors * kWidth;
constexpr int64_t kSteps = 1024; /* a step is one k, or two */
constexpr int64_t kRows = (1024 + kTileRows - 1) / kTileRows * kTileRows;

/* A matrix whose elements lie side by side along k or along the other dimension. */
template <class T>
struct Operand {
  const T* data;
  int64_t stride;   /* from one row of A, or column of B, to the next */
  int64_t k_stride; /* from one k to the next; one of the two is 1 */
  Operand from(int64_t row, int64_t k) const {
    return {data + row * stride + k * k_stride, stride, k_stride};
  }
};

/* How one step of the innermost loop reads its operands: one k at a time, as fp32. */
template <class T>
struct Widened {
  typedef T Element;
  static constexpr int64_t kPerStep = 1;
  /* With 128 the error is MKL's. 16 bits have no use for it: the rounding of the result is 100
   * times the error of a chain of 1024. */
  static constexpr int64_t kChain = sizeof(T) == sizeof(float) ? 128 : kSteps;
  /* n values side by side across k, n <= kWidth. */
  static Vec across(const T* p, int64_t, int64_t, int64_t n) {
    if (n >= kWidth) return load(p);
    return n > 0 ? load_part(p, n, 0.0f) : Vec{};
  }
  /* depth values along k, one per lane. */
  static Vec along(const T* p, int64_t depth) { return across(p, 0, 0, depth); }
  static Vec multiply_add(Vec sum, float a, Vec b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
/* Two k at a time: a lane is a pair of bf16, and one instruction multiplies and adds both. */
struct Pairs {
  typedef bf16 Element;
  static constexpr int64_t kPerStep = 2;
  static constexpr int64_t kChain = kSteps;
  static Vec across(const bf16* p, int64_t k_stride, int64_t depth, int64_t n) {
    if (n <= 0) return Vec{};
    const __mmask16 mask = n >= kWidth ? 0xffff : first_lanes(n);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    if (depth < 2) return (Vec)low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + k_stride));
    return (Vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static Vec along(const bf16* p, int64_t depth) {
    if (depth >= 2 * kWidth) return (Vec)_mm512_loadu_si512(p);
    const __mmask32 mask = depth <= 0 ? 0 : (1u << static_cast<unsigned>(depth)) - 1u;
    return (Vec)_mm512_maskz_loadu_epi16(mask, p);
  }
  static Vec multiply_add(Vec sum, float a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)broadcast(a), (__m512bh)b);
  }
};
#endif

/* ---- packing ---- */

/* Lanes of two vectors side by side, by index. clang has no __builtin_shuffle, GCC 11 no
 * __builtin_shufflevector. */
template <int64_t... kLanes>
static inline Vec lanes_of(Vec a, Vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kLanes...);
#else
  return __builtin_shuffle(a, b, UVec{kLanes...});
#endif
}

/* Exchanges blocks of kStride x kStride: one of the log2(kWidth) stages of a transposition. */
template <int64_t kStride, int64_t... kLane>
static inline void exchange(Vec (&rows)[kWidth], std::integer_sequence<int64_t, kLane...>) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kWidth; ++i) {
    if (i & kStride) continue;
    const Vec a = rows[i], b = rows[i + kStride];
    rows[i] = lanes_of<(kLane & kStride ? kWidth + kLane - kStride : kLane)...>(a, b);
    rows[i + kStride] = lanes_of<(kLane & kStride ? kWidth + kLane : kLane + kStride)...>(a, b);
  }
}
static inline void transpose(Vec (&rows)[kWidth]) {
  constexpr auto lanes = std::make_integer_sequence<int64_t, kWidth>();
  exchange<1>(rows, lanes);
  exchange<2>(rows, lanes);
  if constexpr (kWidth > 4) exchange<4>(rows, lanes);
  if constexpr (kWidth > 8) exchange<8>(rows, lanes);
}

/* A vector of kPanel-wide rows: whole where what it writes too much is overwritten next. */
template <int64_t kPanel>
static inline void save_panel(Vec v, float* to, int64_t w, bool last) {
  if (kPanel - w >= kWidth || !last) {
    save(v, to + w);
  } else {
    save_part(v, to + w, kPanel - w);
  }
}

/* k in steps of kChunk for all panels: a line of memory holds values of two or more. Its rows lie
 * on pages of their own, where the hardware does not prefetch. */
template <class P, int64_t kPanel>
static void pack_across(const Operand<typename P::Element>& from, int64_t width, int64_t depth,
                        float* to) {
  constexpr int64_t kChunk = 8, kAhead = 8;
  const int64_t steps = (depth + P::kPerStep - 1) / P::kPerStep;
  for (int64_t chunk = 0; chunk < steps; chunk += kChunk) {
    const int64_t chunk_end = min_of(chunk + kChunk, steps);
    for (int64_t column = 0; column < width; column += kPanel) {
      float* panel = to + column * steps;
      for (int64_t s = chunk; s < chunk_end; ++s) {
        const int64_t k = s * P::kPerStep;
        const typename P::Element* p = from.data + k * from.k_stride + column;
        for (int64_t i = 0; i < P::kPerStep; ++i) {
          __builtin_prefetch(p + (kAhead + i) * from.k_stride);
        }
#pragma GCC unroll 2
        for (int64_t w = 0; w < kPanel; w += kWidth) {
          const Vec v = P::across(p + w, from.k_stride, depth - k, width - column - w);
          save_panel<kPanel>(v, panel + s * kPanel, w, s == steps - 1);
        }
      }
    }
  }
}

template <class P, int64_t kPanel>
static void pack_along(const Operand<typename P::Element>& from, int64_t width, int64_t depth,
                       float* to) {
  const int64_t steps = (depth + P::kPerStep - 1) / P::kPerStep;
  for (int64_t column = 0; column < width; column += kPanel) {
    float* panel = to + column * steps;
    for (int64_t w = 0; w < kPanel; w += kWidth) {
      const typename P::Element* p = from.data + (column + w) * from.stride;
      const int64_t lanes = min_of(width - column - w, kWidth);
      for (int64_t s = 0; s < steps; s += kWidth) {
        Vec rows[kWidth];
        const int64_t k = s * P::kPerStep;
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i) {
          rows[i] = i < lanes ? P::along(p + i * from.stride + k, depth - k) : Vec{};
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i) {
          const int64_t at = s + i;
          if (at < steps) save_panel<kPanel>(rows[i], panel + at * kPanel, w, at == steps - 1);
        }
      }
    }
  }
}

/* `width` rows of A or columns of B, `depth` deep, as panels of [step][kPanel]. Lanes beyond width
 * are undefined or 0, k beyond depth is 0. */
template <class P, int64_t kPanel>
static void pack(const Operand<typename P::Element>& from, int64_t width, int64_t depth,
                 float* to) {
  if (from.stride == 1) {
    pack_across<P, kPanel>(from, width, depth, to);
  } else {
    pack_along<P, kPanel>(from, width, depth, to);
  }
}

/* Fetches shares [begin, end) of n of what pack() will read next. Right after an optimizer step no
 * weight is in a cache: 2% of a product of 256 rows. */
template <class T>
static void prefetch(const Operand<T>& from, int64_t width, int64_t depth, int64_t begin,
                     int64_t end, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const bool across = from.stride == 1;
  const int64_t stride = across ? from.k_stride : from.stride;
  const int64_t runs = across ? depth : width, run = across ? width : depth;
  for (int64_t r = runs * begin / n; r < runs * end / n; ++r) {
    for (int64_t at = 0; at < run; at += kLine) {
      __builtin_prefetch(from.data + r * stride + at, 0, 2);
    }
  }
}

/* ---- one tile ---- */

/* tile[i][j] (+)= the sum over `steps` of a[step][i] b[step][j], for the first kHeight rows. */
template <class P, int64_t kHeight>
static void multiply(int64_t steps, const float* a, const float* b, bool add, float* tile) {
  constexpr int64_t kAhead = 512; /* floats of A, which comes from the third level: 4% */
  Vec sums[kHeight][kTileVectors];
  const auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kHeight; ++i) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < kTileVectors; ++j) {
        body(sums[i][j], i, j, tile + i * kTileColumns + j * kWidth);
      }
    }
  };
  each([](Vec& sum, int64_t, int64_t, const float*) { sum = Vec{}; });
  for (int64_t s = 0; s < steps; ++s) {
    Vec columns[kTileVectors];
#pragma GCC unroll 2
    for (int64_t j = 0; j < kTileVectors; ++j) columns[j] = load(b + j * kWidth);
    each([&](Vec& sum, int64_t i, int64_t j, const float*) {
      sum = P::multiply_add(sum, a[i], columns[j]);
    });
    __builtin_prefetch(a + kAhead);
    a += kTileRows;
    b += kTileColumns;
  }
  if (add) each([](Vec& sum, int64_t, int64_t, const float* at) { sum += load(at); });
  each([](const Vec& sum, int64_t, int64_t, float* at) { save(sum, at); });
}

/* The same for any height, by the loop for exactly that many rows, and any number of steps, in
 * chains of kChain: sums of sums keep more of fp32 than one long sum. */
template <class P, int64_t kHeight = kTileRows>
static void multiply_rows(int64_t rows, int64_t steps, const float* a, const float* b, bool add,
                          float* tile) {
  if constexpr (kHeight > 1) {
    if (rows < kHeight) return multiply_rows<P, kHeight - 1>(rows, steps, a, b, add, tile);
  }
  int64_t s = 0;
  do {
    multiply<P, kHeight>(min_of(steps - s, P::kChain), a + s * kTileRows, b + s * kTileColumns,
                         add || s > 0, tile);
    s += P::kChain;
  } while (s < steps);
}

/* ---- the loops around it ---- */

/* Rows [row, row_end) and columns [column, column_end) of C. */
struct Part {
  int64_t row, row_end, column, column_end;
};

/* One part of C on one thread. finish(tile, part of C) takes the finished sums of a tile, fp32,
 * kTileColumns from one row to the next. False: no memory. */
template <class P, class Finish>
static bool multiply_part(const Operand<typename P::Element>& a,
                          const Operand<typename P::Element>& b, int64_t depth, const Part& part,
                          const Finish& finish) {
  constexpr int64_t kTile = kTileRows * kTileColumns, kDepth = kSteps * P::kPerStep;
  const int64_t rows = part.row_end - part.row, columns = part.column_end - part.column;
  const int64_t row_panels = (min_of(rows, kRows) + kTileRows - 1) / kTileRows;
  const int64_t column_panels = (columns + kTileColumns - 1) / kTileColumns;
  const auto steps_of = [](int64_t k) { return (k + P::kPerStep - 1) / P::kPerStep; };
  const int64_t most_steps = steps_of(min_of(depth, kDepth));
  const bool once = depth <= kDepth; /* one tile for all, else one for each: sums so far */
  Scratch<float> a_panels(row_panels * kTileRows * most_steps);
  Scratch<float> b_panel(kTileColumns * most_steps);
  Scratch<float> tiles(once ? kTile : row_panels * column_panels * kTile);
  if (a_panels.data == nullptr || b_panel.data == nullptr || tiles.data == nullptr) return false;
  for (int64_t row = part.row; row < part.row_end; row += kRows) {
    const int64_t row_end = min_of(row + kRows, part.row_end);
    for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
      const int64_t deep = min_of(depth - k, kDepth), steps = steps_of(deep);
      pack<P, kTileRows>(a.from(row, k), row_end - row, deep, a_panels.data);
      float* tile = tiles.data;
      for (int64_t column = part.column; column < part.column_end; column += kTileColumns) {
        const int64_t column_end = min_of(column + kTileColumns, part.column_end);
        pack<P, kTileColumns>(b.from(column, k), column_end - column, deep, b_panel.data);
        const int64_t next = min_of(column_end + kTileColumns, part.column_end) - column_end;
        for (int64_t r = row; r < row_end; r += kTileRows) {
          const int64_t r_end = min_of(r + kTileRows, row_end);
          prefetch(b.from(column_end, k), next, deep, r - row, r_end - row, row_end - row);
          multiply_rows<P>(r_end - r, steps, a_panels.data + (r - row) * steps, b_panel.data, k > 0,
                           tile);
          if (k + deep == depth) finish(tile, Part{r, r_end, column, column_end});
          if (!once) tile += kTile;
        }
      }
    }
  }
  return true;
}

}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
