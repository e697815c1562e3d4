/* Sums over all rows: the divisors of the mean before their gradients, the loss after them. Each is
 * a launch that overlaps with the one of the rows: a block of those is on its multiprocessor, and
 * its barriers are made, when the divisors come; the sum of the losses waits on one for the rows.
 */
#ifndef FASTMP_LOSS_TOTALS_H
#define FASTMP_LOSS_TOTALS_H

#include "loss_sums.h"

namespace fastmp {

template <int warps>
struct WarpSums {
  float sums[warps];
};

/* The sum of all threads' values in the first warp, in the order of lanes, then of warps. */
template <int warps>
FASTMP_DEVICE float sum_over_threads(float sum, WarpSums<warps>& shared) {
  sum = sum_over_lanes(sum);
  if (thread() % kWarp == 0) shared.sums[thread() / kWarp] = sum;
  sync_block();
  sum = 0.0f;
  for (int i = thread() % kWarp; i < warps; i += kWarp) sum += shared.sums[i];
  sync_block();
  return sum_over_lanes(sum);
}

/* taken = 0; divisor_partials[t][i] = Σ w_y of target t, over the rows of block i that are not
 * ignored. */
template <int32_t parts>
FASTMP_KERNEL(kThreads, 1)
loss_divisors(const fastmp_ring_args args) {
  FASTMP_SHARED(WarpSums<kThreads / kWarp>, shared);
  allow_next_launch();
  if (block() == 0 && thread() == 0) *args.taken = 0;
  if (args.divisor_partials == nullptr) return;
  float sum_a = 0.0f, sum_b = 0.0f;
  const auto weight_of = [&](int64_t target) {
    const int32_t y = class_of(args, target);
    return y == kOutOfRange ? 0.0f : class_weight(args.weight, y);
  };
  for (int32_t row = block() * kThreads + thread(); row < args.rows; row += parts * kThreads) {
    const TargetPair pair = targets_of(args, row);
    sum_a += weight_of(pair.a);
    sum_b += weight_of(pair.b);
  }
  sum_a = sum_over_threads(sum_a, shared);
  sum_b = sum_over_threads(sum_b, shared);
  if (thread() == 0) {
    args.divisor_partials[block()] = sum_a;
    args.divisor_partials[parts + block()] = sum_b;
  }
}

/* total = Σ loss, by one block: 16 losses of a thread at a time, 64 KB of them in one trip to the
 * L2. */
template <int threads>
FASTMP_KERNEL(threads, 1)
loss_sum(const fastmp_ring_args args) {
  FASTMP_SHARED(WarpSums<threads / kWarp>, shared);
  wait_for_previous_launch();
  constexpr int each = 16;
  float sum = 0.0f;
#pragma unroll 1
  for (int64_t row = thread(); row < args.rows; row += each * threads) {
    float losses[each];
    for (int i = 0; i < each; ++i) {
      losses[i] = row + i * threads < args.rows ? args.loss[row + i * threads] : 0.0f;
    }
    sum += sum_of(losses);
  }
  sum = sum_over_threads(sum, shared);
  if (thread() == 0) *args.total = sum;
}

}  // namespace fastmp
#endif
