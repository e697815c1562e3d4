/* Phase 1 of the step: found_inf and norm of all gradients, by chunks of their rows. */
#ifndef FASTMP_UPDATE_SCAN_H
#define FASTMP_UPDATE_SCAN_H

#include "../common/step.h"
#include "vec.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

constexpr int64_t kChunk = 16384; /* elements of one row, scanned or updated by one thread */
typedef int32_t IntVec __attribute__((vector_size(kWidth * sizeof(int32_t))));

/* Which chunks belong to which row: first_chunk[row] <= chunk < first_chunk[row + 1]. */
struct Chunks {
  const fastmp_row* rows;
  int64_t row_count;
  const int64_t* first_chunk;

  int64_t row_of(int64_t chunk) const {
    int64_t low = 0, high = row_count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
  int64_t begin(int64_t row, int64_t chunk) const { return (chunk - first_chunk[row]) * kChunk; }
  int64_t end(int64_t row, int64_t chunk) const {
    return min_of(begin(row, chunk) + kChunk, rows[row].numel);
  }
};

struct ChunkScan {
  double sum_of_squares;
  bool not_finite;
};

/* The least normal number: a sum of squares that starts here is never subnormal, and ends where one
 * that starts at 0 does, if it takes up the square of a gradient of kTiny. */
constexpr float kLeastNormal = 1.17549435e-38f;
constexpr float kTiny = 2.84217094e-14f;   /* 2^-45 */
constexpr float kEnlarge = 1.84467441e19f; /* 2^64 */

/* Sums and largest magnitudes by lane; as bits, inf and NaN have the largest magnitudes. */
struct LaneScan {
  Vec sum = broadcast(kLeastNormal);
  IntVec largest = {};

  void add(Vec g, Vec unscale) {
    const IntVec magnitude = (IntVec)g & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
    g *= unscale;
    sum = multiply_add(g, g, sum);
  }
};

struct LanesScanned {
  double sum_of_squares;
  float largest;
};

/* Reads as fast as memory delivers: 57 GB/s of fp32 on two cores that copy at 46. Four streams, a
 * quarter of the chunk each, were slower (41 GB/s). */
template <class T>
LanesScanned scan_lanes(const T* grads, int64_t n, float unscale) {
  constexpr int kStreams = 4; /* independent sums: an addition takes four cycles */
  const Vec factor = broadcast(unscale);
  LaneScan streams[kStreams];
  int64_t i = 0;
  for (; i + kStreams * kWidth <= n; i += kStreams * kWidth) {
    for (int s = 0; s < kStreams; ++s) streams[s].add(load(grads + i + s * kWidth), factor);
  }
  for (; i + kWidth <= n; i += kWidth) streams[0].add(load(grads + i), factor);
  if (i < n) streams[0].add(load_part(grads + i, n - i, 0.0f), factor);
  double sum = 0.0;
  int32_t largest = 0;
  /* Of a short tensor the other lanes are 0: adding those took 45 ns, half of its scan. */
  const int used = n < kStreams * kWidth ? 1 : kStreams;
  const int64_t lanes = min_of(n, kWidth);
  for (int s = 0; s < used; ++s) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      sum += static_cast<double>(streams[s].sum[lane]);
      largest = max_of(largest, streams[s].largest[lane]);
    }
  }
  return {sum, float_from_bits(static_cast<uint32_t>(largest))};
}

/* Gradients below kTiny a second time, enlarged: the square of 1e-20 is subnormal. */
template <class T>
ChunkScan scan_chunk(const T* grads, int64_t n, float unscale) {
  const LanesScanned scan = scan_lanes(grads, n, unscale);
  if (scan.largest == 0.0f) return {0.0, false};
  if (scan.largest * unscale < kTiny && unscale < kEnlarge) {
    const double shrink = 1.0 / static_cast<double>(kEnlarge);
    const double sum = scan_lanes(grads, n, unscale * kEnlarge).sum_of_squares;
    return {sum * shrink * shrink, false};
  }
  return {scan.sum_of_squares, !is_finite(scan.largest)};
}

ChunkScan scan_chunk(const fastmp_row& row, int64_t begin, int64_t end, float unscale) {
  const int64_t n = end - begin;
  switch (row.grad_dtype) {
    case FASTMP_F16:
      return scan_chunk(static_cast<const f16*>(row.grad) + begin, n, unscale);
    case FASTMP_BF16:
      return scan_chunk(static_cast<const bf16*>(row.grad) + begin, n, unscale);
    default:
      return scan_chunk(static_cast<const float*>(row.grad) + begin, n, unscale);
  }
}

struct ScanResult {
  double sum_of_squares;
  int64_t first_nonfinite; /* param_index of the row; -1: every gradient is finite */
};

/* False if there is no memory for the partial results. */
bool scan_gradients(const Chunks& chunks, float unscale, ScanResult* result) {
  const int64_t count = chunks.first_chunk[chunks.row_count];
  Scratch<ChunkScan> scans(count);
  if (scans.data == nullptr) return false;
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    int64_t row = chunks.row_of(begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= chunks.first_chunk[row + 1]) ++row;
      scans.data[chunk] =
          scan_chunk(chunks.rows[row], chunks.begin(row, chunk), chunks.end(row, chunk), unscale);
    }
  });
  *result = {0.0, -1};
  for (int64_t chunk = 0; chunk < count; ++chunk) {
    result->sum_of_squares += scans.data[chunk].sum_of_squares;
    if (scans.data[chunk].not_finite && result->first_nonfinite < 0) {
      result->first_nonfinite = chunks.rows[chunks.row_of(chunk)].param_index;
    }
  }
  return true;
}

}  // namespace
}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
