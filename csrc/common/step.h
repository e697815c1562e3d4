/* What a step decides, apart from its rows: whether to happen, how far to clip, with which
 * hyperparameters. Compiled by the CPU library and by the CUDA kernel. */
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

/* The schedule's row for this step: lr, momentum, max_grad_norm, NaN where it says nothing. */
struct Scheduled {
  double lr, momentum, max_grad_norm;
};

FASTMP_FN Scheduled scheduled_by(const fastmp_request& request) {
  const double silent = static_cast<double>(float_from_bits(0x7fc00000u));
  if (request.schedule == nullptr) return {silent, silent, silent};
  const int64_t last = request.schedule_rows - 1;
  const int64_t counted = request.record->applied;
  const int64_t applied = counted < 0 ? 0 : counted; /* a count that was loaded may be anything */
  const double* row = request.schedule + 3 * (applied < last ? applied : last);
  return {row[0], row[1], row[2]};
}

FASTMP_FN bool is_said(double value) {
  return value == value;
}

FASTMP_FN fastmp_hyper follow(fastmp_hyper hyper, const Scheduled& scheduled) {
  if (is_said(scheduled.lr)) hyper.lr *= scheduled.lr;
  if (is_said(scheduled.momentum)) hyper.beta1 = scheduled.momentum;
  return hyper;
}

/* Whether the step looks at the gradients before it uses them. */
FASTMP_FN bool looks_first(const fastmp_request& request, const Scheduled& scheduled) {
  return request.unchecked == 0 || request.max_grad_norm >= 0.0 || scheduled.max_grad_norm >= 0.0;
}

struct Verdict {
  bool skip;
  float norm;        /* of the unscaled gradients */
  float grad_factor; /* unscales and clips */
  int64_t offender;  /* index of the first parameter with a non-finite gradient; -1: none */
};

/* The coefficient is that of torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1.
 */
FASTMP_FN Verdict judge(const fastmp_request& request, const Unscaling& unscaling,
                        const Scheduled& scheduled, double sum_of_squares, int64_t offender) {
  const bool told = request.found_inf != nullptr && *request.found_inf != 0.0f;
  const double limit =
      is_said(scheduled.max_grad_norm) ? scheduled.max_grad_norm : request.max_grad_norm;
  const float norm = static_cast<float>(sqrt(sum_of_squares));
  const float clip = static_cast<float>(limit) / (norm + 1e-6f);
  const float factor = unscaling.factor * (limit >= 0.0 && clip < 1.0f ? clip : 1.0f);
  return {offender >= 0 || told || !unscaling.usable, norm, factor, offender};
}

/* The verdict on gradients that nobody looked at. */
FASTMP_FN Verdict trust(const Unscaling& unscaling) {
  return {false, float_from_bits(0x7fc00000u), unscaling.factor, -1};
}

/* The last act of a step. */
FASTMP_FN void conclude(const fastmp_request& request, const Verdict& verdict) {
  fastmp_record& record = *request.record;
  record.grad_norm = verdict.norm;
  record.found_inf = verdict.skip ? 1.0f : 0.0f;
  if (verdict.skip) {
    record.skipped += 1;
    if (verdict.offender >= 0) record.first_nonfinite = verdict.offender;
  } else {
    record.applied += 1;
  }
}

}  // namespace fastmp
#endif
