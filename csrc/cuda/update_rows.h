/* Phase 2 of the step over the rows of the table. */
#ifndef FASTMP_UPDATE_ROWS_H
#define FASTMP_UPDATE_ROWS_H

#include "update_fast.h"

namespace fastmp {

/* Prepared by one thread, two powers in fp64, unless the row before had the same group and step, as
 * most have. */
template <class Rule>
FASTMP_DEVICE const typename Rule::Coefficients& coefficients_of(const fastmp_step_args& args,
                                                                 const fastmp_row& row, float step,
                                                                 Shared& shared) {
  typedef typename Rule::Coefficients Coefficients;
  static_assert(sizeof(Coefficients) <= sizeof shared.coefficients, "a rule with more of them");
  Coefficients* coefficients = reinterpret_cast<Coefficients*>(shared.coefficients);
  if (row.group != shared.group || step != shared.step) {
    sync_block();
    if (thread() == 0) {
      shared.group = row.group;
      shared.step = step;
      const fastmp_hyper hyper =
          apply_schedule(hyper_of(args, row.group), schedule_row(args.request));
      *coefficients = Rule::prepare(hyper, static_cast<double>(step), shared.decision.grad_factor);
    }
    sync_block();
  }
  return *coefficients;
}

template <class Case>
FASTMP_DEVICE void update_row(const fastmp_step_args& args, int32_t index, int64_t begin,
                              int64_t end, Shared& shared) {
  const fastmp_row& row = args.rows[index];
  /* The epilogue raises the count; that of the first pass has raised it for the second. */
  const float count = *row.step + (Case::Rule::number == MuonRule::number ? 0.0f : 1.0f);
  const typename Case::Rule::Coefficients& prepared =
      coefficients_of<typename Case::Rule>(args, row, count, shared);
  float rate = 1.0f;
  if constexpr (Case::averaged) rate = ema_rate(args.request, count);
  RandomKey key = {};
  if constexpr (Case::State::kind != FASTMP_STATE_F32) {
    key = random_key(args.request.rounding_seed, count, row.param_index, begin);
  }
  const Tensors<Case> tensors = Tensors<Case>::of(row, gradient_of(args, index));
  constexpr int n = Case::State::block > 0 ? Case::State::block / kGroup : 4;
  constexpr int32_t packet = n * kThreads;
  const bool aligned = tensors.template are_aligned<n>();
  if constexpr (Case::State::block > 0) {
    /* A warp goes one way: its threads meet in shuffles. The row, its gradient's address and the
     * coefficients are read again each time, from L1 and shared memory: 26 registers, which would
     * spill. */
    constexpr int64_t warp = kWarp * n;
    sync_block();
    if (thread() == 0) shared.grad = tensors.grad;
    sync_block();
    const RowStep<Case> step = {prepared, rate, key};
    const int64_t whole = aligned ? end / warp * warp : begin;
#pragma unroll 1
    for (int64_t i = ceil_div(end, warp) * warp - n * (thread() + 1) - packet * shared.share.first;
         i >= begin; i -= packet * shared.share.stride) {
      if (i < whole && update_fast<Case, n>(Tensors<Case>::of(row, shared.grad), i, step)) continue;
      const int count = static_cast<int>(min_of<int64_t>(end - i, n));
      update_at(Tensors<Case>::of(row, shared.grad), Guarded<n>{i, count}, step);
    }
  } else {
    const typename Case::Rule::Coefficients coefficients = prepared;
    const RowStep<Case> step = {coefficients, rate, key};
    const int64_t whole = aligned ? end / 4 * 4 : begin;
#pragma unroll 1
    for (int64_t i = whole + thread() + kThreads * shared.share.first; i < end;
         i += kThreads * shared.share.stride) {
      update_at(tensors, Whole<1>{i}, step);
    }
#pragma unroll 1
    for (int64_t i = whole - 4 * (thread() + 1) - packet * shared.share.first; i >= begin;
         i -= packet * shared.share.stride) {
      update_at(tensors, Whole<4>{i}, step);
    }
  }
}

/* Whether the blocks go through each row together, packet by packet, instead of through a range of
 * chunks each: memory likes it where rows are long. On an H200, 105 M parameters in 10 rows: 2%
 * with fp32 states, 3% with 8-bit ones, -3% with bf16 ones. A row costs each block some µs, which 8
 * chunks pay for. */
template <class... Cases>
FASTMP_DEVICE bool go_together(const fastmp_step_args& args) {
  const bool bf16_states = ((Cases::State::kind == FASTMP_STATE_BF16) || ...);
  const int64_t least = int64_t{8} * blocks() * args.row_count;
  return !bf16_states && args.chunk_count >= least &&
         args.chunk_count < (int64_t{1} << 32) / kChunk; /* one key of random bits for a row */
}

template <class... Cases>
FASTMP_DEVICE void update_chunks(const fastmp_step_args& args, Shared& shared) {
  const bool together = go_together<Cases...>(args);
  if (thread() == 0) shared.share = together ? Share{block(), blocks()} : Share{0, 1};
  sync_block();
  const int32_t first = together ? 0 : partition_begin(args.chunk_count, block(), blocks());
  int32_t last =
      together ? args.row_count : partition_begin(args.chunk_count, block() + 1, blocks());
  while (last > first) {
    const Range range = together ? whole_row(args, --last) : last_range(args, first, last);
    const fastmp_row& row = args.rows[range.row];
    ((Cases::matches(row) ? update_row<Cases>(args, range.row, range.begin, range.end, shared)
                          : void()),
     ...);
  }
}

}  // namespace fastmp
#endif
