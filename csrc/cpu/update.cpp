/* update: one optimizer step over a table of tensors.
 *
 *   phase 1   found_inf = any gradient not finite;  norm = || grad / scale ||
 *   phase 2   unless found_inf:  g = grad / scale * min(1, max_norm / norm);  rule(master, g);
 *             weight = round(master)
 *   master    where it no longer rounds to the weight: the weight, which was changed from outside
 *
 * Bytes per parameter with Adam and 16-bit weights and gradients: phase 1 reads 2; phase 2 reads
 * the gradient (2), the weight (2), the master (4, split: its remainder 2) and the moments (8) and
 * writes moments, master and weight (14, split 12): 32, split 28. With fp32 weights 4 + 28 = 32.
 * bf16 states save 8 of these, 8-bit ones 11.9; an average adds 8.
 * Phase 2 walks backwards, so the gradients scanned last are still in cache.
 *
 * Every sum has a fixed order that no number of threads changes: vector lanes within a chunk, the
 * lanes in order, then the chunks in order, in fp64. */
#include "update_block.h"
#include "update_scan.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

/* ---- phase 2 ---- */

void move_averages(float* __restrict average, const float* __restrict value, int64_t n,
                   float rate) {
  for (int64_t i = 0; i < n; ++i) average[i] = move_average(average[i], value[i], rate);
}

template <class Rule>
void apply_block(float* __restrict p, const float* __restrict g, float* __restrict s0,
                 float* __restrict s1, float* __restrict s2, int64_t n,
                 const typename Rule::Coefficients& coefficients) {
  const typename Rule::Coefficients k = coefficients; /* a copy: nothing below can alias it */
  Ieee arithmetic;
  for (int64_t i = 0; i < n; ++i) Rule::apply(p[i], g[i], s0[i], s1[i], s2[i], k, arithmetic);
}

/* Arguments of phase 2 that are the same for all rows. */
struct UpdateStep {
  const fastmp_hyper* groups;
  ScheduleRow scheduled;
  float grad_factor; /* unscales and clips */
  const fastmp_request* request;
};

/* The last coefficients of a thread: two powers a chunk were 8% of a step over 1,000 small tensors,
 * most of which share group and step. */
struct CoefficientCache {
  int32_t group = -1;
  float step = -1.0f;
  float coefficients[12];
};

template <class Rule>
typename Rule::Coefficients coefficients_of(const fastmp_row& row, const UpdateStep& step,
                                            CoefficientCache* cache) {
  typename Rule::Coefficients k;
  static_assert(sizeof k <= sizeof cache->coefficients, "a rule with more coefficients");
  if (cache->group == row.group && cache->step == *row.step) {
    memcpy(&k, cache->coefficients, sizeof k);
    return k;
  }
  k = Rule::prepare(apply_schedule(step.groups[row.group], step.scheduled),
                    static_cast<double>(*row.step), step.grad_factor);
  memcpy(cache->coefficients, &k, sizeof k);
  cache->group = row.group;
  cache->step = *row.step;
  return k;
}

template <class Rule, class Kind>
void update_chunk(const fastmp_row& row, const UpdateStep& step, int64_t begin, int64_t end,
                  CoefficientCache* cache) {
  const auto k = coefficients_of<Rule>(row, step, cache);
  const float rate = ema_rate(*step.request, *row.step);
  const RandomKey key = random_key(step.request->rounding_seed, *row.step, row.param_index, begin);
  alignas(64) float grads[kBlock], masters[kBlock] = {}; /* no rule reads an OUTPUT's */
  StateBlock<Rule, Kind> states;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = min_of(kBlock, end - at);
    if (at + kPrefetch + kBlock <= end) prefetch_block<Rule, Kind>(row, at + kPrefetch);
    float* master = read_master(row, at, n, masters);
    const float* grad = read_grad(row, at, n, grads);
    if (!states.apply(row, at, n, key, master, grad, k)) {
      states.read(row, at, n);
      apply_block<Rule>(master, grad, states.values[0], states.values[1], states.values[2], n, k);
      states.write(row, at, n, key);
    }
    if (row.average != nullptr) move_averages(row.average + at, master, n, rate);
    write_weight(row, at, n, master);
  }
}

template <class Rule>
void update_chunk(const fastmp_row& row, const UpdateStep& step, int64_t begin, int64_t end,
                  CoefficientCache* cache) {
  switch (row.state_kind) {
#define FASTMP_CASE(Kind)                                   \
  case Kind::kind:                                          \
    update_chunk<Rule, Kind>(row, step, begin, end, cache); \
    break;
    FASTMP_STATE_KINDS(FASTMP_CASE)
#undef FASTMP_CASE
  }
}

void update_chunks(const Chunks& chunks, const UpdateStep& step) {
  parallel_for(chunks.first_chunk[chunks.row_count], 1, [&](int64_t begin, int64_t end) {
    int64_t row = chunks.row_of(end - 1);
    CoefficientCache cache;
    for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
      while (chunk < chunks.first_chunk[row]) --row;
      const fastmp_row& r = chunks.rows[row];
      const int64_t from = chunks.begin(row, chunk), to = chunks.end(row, chunk);
      switch (static_cast<int>(step.groups[r.group].rule)) {
#define FASTMP_CASE(Rule)                          \
  case Rule::number:                               \
    update_chunk<Rule>(r, step, from, to, &cache); \
    break;
        FASTMP_RULES(FASTMP_CASE)
#undef FASTMP_CASE
      }
    }
  });
}

/* ---- the step ---- */

int states_of(const fastmp_hyper& hyper) {
  if (!(hyper.rule >= 0.0 && hyper.rule < 256.0)) return -1; /* NaN, or more than an int holds */
  switch (static_cast<int>(hyper.rule)) {
#define FASTMP_CASE(Rule) \
  case Rule::number:      \
    return Rule::states;
    FASTMP_RULES(FASTMP_CASE)
#undef FASTMP_CASE
    default:
      return -1;
  }
}

bool is_valid(const fastmp_request& request) {
  if (request.record == nullptr) return false;
  if (!is_aligned(8, request.record, request.schedule, request.ema_decays)) return false;
  if (request.schedule != nullptr && request.schedule_rows < 1) return false;
  if (request.ema_decays != nullptr && request.ema_rows < 1) return false;
  if (!is_addressable(24, request.schedule_rows)) return false;
  if (!is_addressable(8, request.ema_rows)) return false;
  return is_aligned(4, request.grad_scale, request.external_found_inf);
}

bool is_valid(const fastmp_update_args& args) {
  if (!is_valid(args.request) || !is_aligned(8, args.rows, args.groups)) return false;
  if (!is_addressable(sizeof(fastmp_row), args.row_count)) return false;
  if (!is_addressable(sizeof(fastmp_hyper), args.group_count)) return false;
  if (args.row_count > 0 && (args.rows == nullptr || args.groups == nullptr)) return false;
  for (int64_t i = 0; i < args.row_count; ++i) {
    const fastmp_row& row = args.rows[i];
    if (row.group >= args.group_count || row.step == nullptr) return false;
    if (!is_addressable(4, row.numel)) return false;
    const int states = states_of(args.groups[row.group]);
    if (states < 0 || row.param_dtype > FASTMP_BF16 || row.grad_dtype > FASTMP_BF16) return false;
    if (row.master_kind > FASTMP_OUTPUT) return false;
    if ((row.master_kind == FASTMP_SELF) != (row.param_dtype == FASTMP_F32)) return false;
    if (row.state_kind > FASTMP_STATE_8BIT) return false;
    const int64_t widths[] = {4, 2, 1}; /* by kind */
    const int64_t width = widths[row.state_kind];
    if (!is_aligned(width, row.state0, row.state1, row.state2)) return false;
    if (!is_aligned(4, row.step, row.average)) return false;
    if (row.average != nullptr && args.request.ema_decays == nullptr) return false;
    if (!is_aligned(bytes_of(row.param_dtype), row.param)) return false;
    if (!is_aligned(bytes_of(row.grad_dtype), row.grad)) return false;
    if (!is_aligned(row.master_kind == FASTMP_SPLIT ? 2 : 4, row.master)) return false;
    if (row.numel == 0) continue;
    if (row.param == nullptr || row.grad == nullptr) return false;
    const bool has_master = row.master_kind == FASTMP_FULL || row.master_kind == FASTMP_SPLIT;
    if (has_master && row.master == nullptr) return false;
    if (row.state_kind == FASTMP_STATE_8BIT && states > 0 && row.scales == nullptr) return false;
    const void* state[3] = {row.state0, row.state1, row.state2};
    for (int s = 0; s < states; ++s) {
      if (state[s] == nullptr) return false;
    }
  }
  return true;
}

}  // namespace

int update(const fastmp_update_args* args) {
  if (!is_valid(*args)) return FASTMP_BAD_ARGUMENT;
  Scratch<int64_t> first_chunk(args->row_count + 1);
  if (first_chunk.data == nullptr) return FASTMP_NO_MEMORY;
  first_chunk.data[0] = 0;
  for (int64_t i = 0; i < args->row_count; ++i) {
    first_chunk.data[i + 1] = first_chunk.data[i] + ceil_div(args->rows[i].numel, kChunk);
  }
  const Chunks chunks = {args->rows, args->row_count, first_chunk.data};
  const fastmp_request& request = args->request;
  const Unscaling unscaling = unscaling_of(request);
  const ScheduleRow scheduled = schedule_row(request);
  StepDecision decision = unchecked_decision(unscaling);
  if (request.continues != 0) {
    decision = continued_decision(request);
  } else if (needs_scan(request, scheduled)) {
    ScanResult scan;
    if (!scan_gradients(chunks, unscaling.factor, &scan)) return FASTMP_NO_MEMORY;
    decision = decide(request, unscaling, scheduled, scan.sum_of_squares, scan.first_nonfinite);
  }
  if (!decision.skip) {
    for (int64_t i = 0; i < args->row_count && request.continues == 0; ++i) {
      *args->rows[i].step += 1.0f;
    }
    update_chunks(chunks, {args->groups, scheduled, decision.grad_factor, &request});
  }
  if (request.continues == 0) commit_step(request, decision);
  return FASTMP_OK;
}

}  // namespace FASTMP_TARGET
}  // namespace fastmp
