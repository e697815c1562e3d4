/* The decisions of a step: skip or apply, clip coefficient, hyperparameters of the schedule.
 * Compiled into the CPU library and the CUDA kernel; fastmp/ops/update has the same in Python. */
#ifndef FASTMP_STEP_H
#define FASTMP_STEP_H

#include "numerics.h"
#include "table.h"
#ifndef __CUDACC_RTC__
#include <math.h>
#endif

namespace fastmp {

/* 1 / loss scale. Not usable: the scale has no finite inverse, or is not finite itself. */
struct Unscaling {
  float factor;
  bool usable;
};

FASTMP_FN Unscaling unscaling_of(const fastmp_request& request) {
  const float scale = request.grad_scale == nullptr ? 1.0f : *request.grad_scale;
  const bool usable = is_finite(scale) && is_finite(1.0f / scale);
  return {usable ? static_cast<float>(1.0 / static_cast<double>(scale)) : 1.0f, usable};
}

/* The number of applied steps before this one. */
FASTMP_FN int64_t applied_before(const fastmp_request& request) {
  const int64_t counted = request.record->applied - (request.continues != 0 ? 1 : 0);
  return counted < 0 ? 0 : counted; /* a count that was loaded may be anything */
}

/* The schedule's row for this step: lr, momentum, max_grad_norm, each of them NaN where unset. */
struct ScheduleRow {
  double lr, momentum, max_grad_norm;
};

FASTMP_FN ScheduleRow schedule_row(const fastmp_request& request) {
  const double unset = static_cast<double>(float_from_bits(0x7fc00000u));
  if (request.schedule == nullptr) return {unset, unset, unset};
  const int64_t last = request.schedule_rows - 1;
  const int64_t applied = applied_before(request);
  const double* row = request.schedule + 3 * (applied < last ? applied : last);
  return {row[0], row[1], row[2]};
}

FASTMP_FN bool is_set(double value) {
  return value == value;
}

FASTMP_FN fastmp_hyper apply_schedule(fastmp_hyper hyper, const ScheduleRow& scheduled) {
  if (is_set(scheduled.lr)) hyper.lr *= scheduled.lr;
  if (is_set(scheduled.momentum)) hyper.beta1 = scheduled.momentum;
  return hyper;
}

/* How far an average goes towards its weight in the step that a tensor takes: 1 - decay. The first
 * step copies the weight, as torch.optim.swa_utils.AveragedModel does. */
FASTMP_FN float ema_rate(const fastmp_request& request, float step) {
  if (request.ema_decays == nullptr || step <= 1.0f) return 1.0f;
  const int64_t last = request.ema_rows - 1;
  const int64_t applied = applied_before(request);
  return static_cast<float>(1.0 - request.ema_decays[applied < last ? applied : last]);
}

/* torch.lerp: exact at a rate of 1, and where average and value are equal. */
FASTMP_FN float move_average(float average, float value, float rate) {
  const float base = rate < 0.5f ? average : value;
  return base + (value - average) * (rate < 0.5f ? rate : rate - 1.0f);
}

/* The norm to clip to; negative: no clipping. */
FASTMP_FN double max_norm_of(const fastmp_request& request, const ScheduleRow& scheduled) {
  return is_set(scheduled.max_grad_norm) ? scheduled.max_grad_norm : request.max_grad_norm;
}

/* Scan the gradients before the update? Clipping needs their norm, loss scaling the overflow check.
 */
FASTMP_FN bool needs_scan(const fastmp_request& request, const ScheduleRow& scheduled) {
  return request.skip_nonfinite_check == 0 || request.grad_scale != nullptr ||
         request.external_found_inf != nullptr || max_norm_of(request, scheduled) >= 0.0;
}

/* That of torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1. */
FASTMP_FN float clip_coefficient(float norm, double max_norm) {
  const float coefficient = static_cast<float>(max_norm) / (norm + 1e-6f);
  return max_norm >= 0.0 && coefficient < 1.0f ? coefficient : 1.0f;
}

struct StepDecision {
  bool skip;
  float norm;              /* of the unscaled gradients */
  float grad_factor;       /* unscales and clips */
  int64_t first_nonfinite; /* param_index of the first non-finite gradient; -1: none */
};

FASTMP_FN StepDecision decide(const fastmp_request& request, const Unscaling& unscaling,
                              const ScheduleRow& scheduled, double sum_of_squares,
                              int64_t first_nonfinite) {
  const bool external_found_inf =
      request.external_found_inf != nullptr && *request.external_found_inf != 0.0f;
  const float norm = static_cast<float>(sqrt(sum_of_squares));
  const float clip = clip_coefficient(norm, max_norm_of(request, scheduled));
  return {first_nonfinite >= 0 || external_found_inf || !unscaling.usable, norm,
          unscaling.factor * clip, first_nonfinite};
}

/* Decision without a scan: apply, norm = NaN. */
FASTMP_FN StepDecision unchecked_decision(const Unscaling& unscaling) {
  return {false, float_from_bits(0x7fc00000u), unscaling.factor, -1};
}

/* Decision of a second pass: that of the first, on gradients that need no factor. */
FASTMP_FN StepDecision continued_decision(const fastmp_request& request) {
  return {request.record->found_inf != 0.0f, request.record->grad_norm, 1.0f, -1};
}

/* Writes the decision to the record, after the update. */
FASTMP_FN void commit_step(const fastmp_request& request, const StepDecision& decision) {
  fastmp_record& record = *request.record;
  record.grad_norm = decision.norm;
  record.found_inf = decision.skip ? 1.0f : 0.0f;
  if (decision.skip) {
    record.skipped += 1;
    if (decision.first_nonfinite >= 0) record.first_nonfinite = decision.first_nonfinite;
  } else {
    record.applied += 1;
  }
}

}  // namespace fastmp
#endif
