/* update: one optimizer step over a table of tensors, in one cooperative launch.
 *
 *   phase 1   found_inf = any gradient not finite;  norm = || grad / scale ||
 *   barrier   across the grid
 *   phase 2   unless found_inf:  g = grad / scale * min(1, max_norm / norm);  rule(master, g);
 *             weight = round(master)
 *   master    where it no longer rounds to the weight: the weight, which was changed from outside
 *   epilogue  of the last block: step counts, record
 *
 * Bytes per parameter with Adam and 16-bit weights and gradients: phase 1 reads 2; phase 2 reads
 * the gradient (2), the weight (2), the master (4, split: its remainder 2) and the moments (8) and
 * writes moments, master and weight (14, split 12): 32, split 28. With fp32 weights 4 + 28 = 32.
 * bf16 states save 8 of these, 8-bit ones 11.9; an average adds 8. The table adds 8 for every
 * chunk.
 *
 * With 8-bit states a thread updates 8 elements: 4 have too few bytes on their way. Measured on an
 * H200, 105 M parameters, bf16 weights: fp32 states 0.741 ms, 8 bits 0.487; when every scale was
 * written 0.517, with ranges of chunks besides 0.526, by the general path 0.571. With 2 blocks a
 * multiprocessor instead of 3, or with the next packet prefetched into L2, 2 to 5% slower.
 *
 * A block scans one contiguous range of chunks. It updates the same range backwards, so that the
 * gradients scanned last are still in L2; where rows are long all blocks go through each of them
 * together, packet by packet, which memory likes better. A thread updates 4 elements at a
 * time: 128 bits of every fp32 stream, 64 of every 16-bit one; 1,024 threads a multiprocessor have
 * 56 KB on their way, twice what an H200's bandwidth times its latency asks for (predicted).
 *
 * Measured on an H200, 105 M parameters in long rows, of a copy: fp32 94%, fp16 and bf16 93%; with
 * a contiguous range for each block 93, 91 and 91. Streaming hints (.cs) on loads and stores cost
 * 2%, spans of 4 or 16 packets as much as ranges do.
 *
 * The norm has one order of summation on every GPU, whatever its number of multiprocessors: the
 * chunks are divided into at most 2,048 partials, a partial is summed by one block and the partials
 * in order. */
#include "update_rows.h"
#include "update_scan.h"

namespace fastmp {

/* Phase 1 and the barrier; every block comes to the same decision. */
FASTMP_DEVICE void scan_and_decide(const fastmp_step_args& args, Shared& shared) {
  const fastmp_request& request = args.request;
  const Unscaling unscaling = unscaling_of(request);
  StepDecision decision = unchecked_decision(unscaling);
  if (request.continues != 0) {
    decision = continued_decision(request);
  } else if (needs_scan(request, schedule_row(request))) {
    scan_partials(args, unscaling.factor, shared);
    sync_grid(&request.record->barrier);
    const ScanResult all = sum_over_partials(args, shared);
    const int32_t row = all.first_nonfinite;
    const int64_t first_nonfinite = row == kNoRow ? -1 : args.rows[row].param_index;
    decision =
        decide(request, unscaling, schedule_row(request), all.sum_of_squares, first_nonfinite);
  }
  if (thread() == 0) {
    shared.decision = decision;
    shared.group = -1;
  }
  sync_block();
}

/* Whether this is the last block to arrive; all others have then read what the epilogue changes. */
FASTMP_DEVICE bool is_last_block(fastmp_record* record, Shared& shared) {
  sync_block();
  if (thread() == 0) {
    shared.is_last = atomic_add_acq_rel(&record->done, 1u) == static_cast<uint32_t>(blocks() - 1);
  }
  sync_block();
  return shared.is_last;
}

/* Blocks on a multiprocessor, which share 65,536 registers: 64 a thread for one case with two
 * fp32 streams beside the weight, the most that fit into them; else 80 (rounding a narrow state
 * takes 10 more) or 128. */
template <class... Cases>
FASTMP_FN constexpr int blocks_for() {
  const bool many = ((Cases::Rule::states + Cases::averaged > 2) || ...);
  const bool blocks = ((Cases::State::block > 0) || ...);
  const bool narrow = ((Cases::State::kind != FASTMP_STATE_F32) || ...);
  const int cases = sizeof...(Cases);
  if (cases > 3 || (blocks && many)) return 2;
  return cases > 1 || narrow || many ? 3 : 4;
}

template <int words, class... Cases>
FASTMP_KERNEL(kThreads, blocks_for<Cases...>())
update(FASTMP_ARGUMENT(Argument<words>, argument)) {
  const fastmp_step_args& args = argument.head;
  FASTMP_SHARED(Shared, shared);
  scan_and_decide(args, shared);
  if (!shared.decision.skip) update_chunks<Cases...>(args, shared);
  if (!is_last_block(args.request.record, shared)) return;
  const bool counts = args.request.continues == 0;
  if (counts && !shared.decision.skip) {
    for (int32_t i = thread(); i < args.row_count; i += kThreads) *args.rows[i].step += 1.0f;
  }
  if (thread() == 0) {
    if (counts) commit_step(args.request, shared.decision);
    args.request.record->done = 0u;
  }
}

}  // namespace fastmp
