/* Phase 1 of the step: found_inf and norm of all gradients. 2 bytes a parameter of 16-bit
 * gradients. */
#ifndef FASTMP_UPDATE_SCAN_H
#define FASTMP_UPDATE_SCAN_H

#include "update_chunks.h"

namespace fastmp {

/* Barrier across the grid; writes before it are visible to all blocks after it. All blocks must run
 * at once, which a cooperative launch ensures. The first block adds 2^31 less the number of the
 * others: the top bit flips when all have arrived, whatever the word was. It needs no reset. */
FASTMP_DEVICE void sync_grid(uint32_t* barrier) {
  sync_block();
  if (thread() == 0) {
    const uint32_t others = static_cast<uint32_t>(blocks() - 1);
    const uint32_t before = atomic_add_acq_rel(barrier, block() == 0 ? 0x80000000u - others : 1u);
    while (((load_acquire(barrier) ^ before) & 0x80000000u) == 0u) {
    }
  }
  sync_block();
}

FASTMP_DEVICE ScanResult sum_of(const ScanResult& a, const ScanResult& b) {
  return {a.sum_of_squares + b.sum_of_squares, min_of(a.first_nonfinite, b.first_nonfinite)};
}

/* The sum over the block, for all its threads. */
FASTMP_DEVICE ScanResult sum_over_block(ScanResult mine, Shared& shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    mine = sum_of(mine, {shuffle_down(mine.sum_of_squares, offset),
                         shuffle_down(mine.first_nonfinite, offset)});
  }
  if (thread() % kWarp == 0) shared.warps[thread() / kWarp] = mine;
  sync_block();
  ScanResult all = shared.warps[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) all = sum_of(all, shared.warps[warp]);
  sync_block();
  return all;
}

/* Squares in fp32, 16 bytes of gradients at a time; their sums in fp64. */
struct Squares {
  double sum;
  uint32_t largest; /* magnitude, as bits: inf and NaN are the largest */

  template <int n, class T>
  __device__ __forceinline__ void add(const T* grads, float factor) {
    Packet<T, n> packet;
    packet.bits = read_only(reinterpret_cast<const decltype(packet.bits)*>(grads));
    float squares = 0.0f;
    for (int i = 0; i < n; ++i) {
      const float g = to_float(packet.items[i]);
      const uint32_t magnitude = bits_of(g) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
      squares += (g * factor) * (g * factor);
    }
    sum += static_cast<double>(squares);
  }
};

template <class T>
FASTMP_DEVICE ScanResult scan(const void* gradients, int32_t row, int64_t begin, int64_t end,
                              float factor) {
  constexpr int n = 16 / sizeof(T);
  const T* grads = static_cast<const T*>(gradients);
  const int64_t whole = is_aligned<n>(grads) ? end / n * n : begin;
  Squares squares = {0.0, 0u};
#pragma unroll 4
  for (int64_t i = begin + thread() * n; i < whole; i += kThreads * n) {
    squares.add<n>(grads + i, factor);
  }
#pragma unroll 1
  for (int64_t i = whole + thread(); i < end; i += kThreads) squares.add<1>(grads + i, factor);
  return {squares.sum, squares.largest >= 0x7f800000u ? row : kNoRow};
}

FASTMP_DEVICE ScanResult scan_row(const fastmp_step_args& args, int32_t index, int64_t begin,
                                  int64_t end, float factor) {
  const void* grad = gradient_of(args, index);
  switch (args.rows[index].grad_dtype) {
    case FASTMP_F16:
      return scan<f16>(grad, index, begin, end, factor);
    case FASTMP_BF16:
      return scan<bf16>(grad, index, begin, end, factor);
    default:
      return scan<float>(grad, index, begin, end, factor);
  }
}

/* Computes the partials of this block. */
FASTMP_DEVICE void scan_partials(const fastmp_step_args& args, float factor, Shared& shared) {
  const int32_t last = partition_begin(args.partial_count, block() + 1, blocks());
  for (int32_t partial = partition_begin(args.partial_count, block(), blocks()); partial < last;
       ++partial) {
    ScanResult mine = {0.0, kNoRow};
    const int32_t first = partial * args.chunks_per_partial;
    int32_t end = min_of(first + args.chunks_per_partial, args.chunk_count);
    while (end > first) {
      const Range range = last_range(args, first, end);
      mine = sum_of(mine, scan_row(args, range.row, range.begin, range.end, factor));
    }
    const ScanResult all = sum_over_block(mine, shared);
    if (thread() == 0) {
      args.partial_sums[partial] = all.sum_of_squares;
      args.partial_nonfinite_rows[partial] = all.first_nonfinite;
    }
  }
}

/* The sum over all partials, the same in every block. */
FASTMP_DEVICE ScanResult sum_over_partials(const fastmp_step_args& args, Shared& shared) {
  ScanResult mine = {0.0, kNoRow};
  for (int32_t partial = thread(); partial < args.partial_count; partial += kThreads) {
    mine = sum_of(mine, {args.partial_sums[partial], args.partial_nonfinite_rows[partial]});
  }
  return sum_over_block(mine, shared);
}

}  // namespace fastmp
#endif
