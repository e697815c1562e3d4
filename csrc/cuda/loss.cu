/* loss: cross-entropy of a mixed pair of targets with smoothing, and its gradient, for rows that do
 * not fit into registers: each stays in shared memory between its two uses. For a row z, with
 * row_max = max z, e = exp(z - row_max) and sum_exp = Σ e:
 *
 *   loss   = Σ_{y in a, b} mix_weight_y ( (1-ε) w_y (log sum_exp - (z_y - row_max))
 *                                         + ε/C (Σw log sum_exp + Σ_c w_c (row_max - z_c)) )
 *   grad_c = softmax_coef e_c / sum_exp - smooth_coef w_c, at the targets as in common/loss.h
 *
 *   mix_weight_a = λ / divisor_a,   mix_weight_b = (1-λ) / divisor_b
 *   divisor_y    = Σ w_y over the rows that are not ignored (reduction mean), else 1
 *
 * Bytes: 2 read and 2 written for each 16-bit logit, about 40 for each row; rows whose targets are
 * ignored are not read. A kernel that reads the row twice from memory moves 6 instead of 4.
 *
 * A row goes through the ring of loss_ring.h. As its chunks arrive each thread takes its 16 bytes
 * of them into sums; the block meets once, with a cluster of two once more; the chunks are read a
 * second time, from shared memory, and the gradient is written. Meanwhile the producer fills the
 * chunks that are given back. Rows that no multiprocessor holds are halved between two blocks of a
 * cluster.
 *
 * A thread's sums are relative to the largest logit of its first vector, and not to a running
 * maximum, which would change in nearly every chunk of some lane: terms of up to 2^64 harm no fp32
 * sum. Where they are larger the thread goes over the row once more, relative to its own maximum,
 * which it knows by then. An exponent is one multiply_add (Reference in loss_sums.h), smoothing
 * adds up the exponents themselves.
 *
 * Cycles, for 8,192 x 32,000 in bf16 on an H200 (2026-11-27): 269 us, 91% of a copy, are 7,600 a
 * row. Two exponentials a logit take 4,000 of them on 16 special-function lanes, and overlap with
 * the instructions, which 128 lanes issue: 7.5 a logit in the first pass and 7 in the second (SASS,
 * with smoothing), 6.4 and 5.9 where a thread has two vectors of a chunk, and about 450 a warp for
 * what is done once a row. That is 5,400 with 16 warps. Twelve and ten a logit were 8,400, all
 * that there were at 82% of a copy.
 *
 * Launches: the divisors, these rows, the sum of their losses, of which the last two begin before
 * the one ahead has ended (loss_totals.h), and the check of the backward. Divisors are not assumed,
 * as for short rows: most batches of a language model have targets that are ignored, and a wrong
 * assumption costs 4 bytes a logit once more, to save one launch.
 *
 * Every sum has one order: 16 bytes, chunks, lanes, warps, halves. */
#include "loss_consumer.h"
#include "loss_totals.h"

namespace fastmp {

/* K::threads consumers and one warp of which a thread is the producer. */
template <class K>
FASTMP_DEVICE void take_rows(const fastmp_ring_args& args) {
  FASTMP_DYNAMIC_SHARED(memory);
  FASTMP_SHARED(Shared, shared);
  allow_next_launch();
  const Ring<K> ring = Ring<K>::in(memory, args.slots);
  const int32_t rank = K::cluster > 1 ? rank_in_cluster() : 0;
  if (thread() == 0) {
    ring.init_barriers();
    init(shared_address(&shared.exchange[0]), K::cluster);
    init(shared_address(&shared.exchange[1]), K::cluster);
    publish_barriers();
  }
  sync_block();
  if constexpr (K::cluster > 1) sync_cluster();
  const int32_t first = block() / K::cluster, step = blocks() / K::cluster;
  if (thread() >= K::threads) {
    wait_for_previous_launch(); /* for the divisors; nothing else here was written by it */
    const Divisors divisors = load_divisors(args);
    if (thread() == K::threads) {
      if (block() == 0) store_divisors(args, divisors);
      produce<K>(args, ring, constants_of(args, divisors), first, step, rank);
    }
    sync_warp();
  } else {
    Consumer<K> consumer = {args, ring, shared, rank, {0, 0u}, 0};
    while (consumer.take_row()) {
    }
  }
  /* The other block may still write to this one's shared memory. */
  if constexpr (K::cluster > 1) sync_cluster();
}

/* at_once: blocks that share the registers of a multiprocessor. */
template <class K, int at_once>
FASTMP_KERNEL(K::threads + kWarp, at_once)
loss_rows(const fastmp_ring_args args) {
  static_assert(K::cluster == 1, "one block a row");
  take_rows<K>(args);
}

template <class K>
FASTMP_CLUSTER_KERNEL(K::threads + kWarp, K::cluster)
loss_half_rows(const fastmp_ring_args args) {
  static_assert(K::cluster == 2, "two blocks a row");
  take_rows<K>(args);
}

}  // namespace fastmp
