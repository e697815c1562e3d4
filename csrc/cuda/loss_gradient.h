/* Loss and gradient of a row, from its sums. Formulas: loss.cu and ../common/loss.h. */
#ifndef FASTMP_LOSS_GRADIENT_H
#define FASTMP_LOSS_GRADIENT_H

#include "loss_sums.h"

namespace fastmp {

struct Gradient {
  Reference reference;
  float softmax, smooth_coef; /* softmax: what an exponential of the reference is multiplied with */
  float at_a, at_b;
};

template <class K>
FASTMP_DEVICE float gradient_at(const Gradient& g, float z, int32_t at, const float* weight) {
  const float e = exp2_fast(g.reference.exponent(z));
  if constexpr (K::smooth == Smooth::none) return e * g.softmax;
  const float w = K::smooth == Smooth::weighted ? read_only(weight + at) : 1.0f;
  return multiply_add(e, g.softmax, -(g.smooth_coef * w));
}

FASTMP_DEVICE float target_loss(const fastmp_ring_args& args, int32_t y, float mix_weight, float w,
                                float nll, float smooth_loss) {
  return mix_weight * (y == kIgnored ? 0.0f : args.target_prob * w * nll + smooth_loss);
}

/* The exponentials of a row's targets, and of all that is beside the larger of them; 0 for a target
 * that is ignored or out of range, and for the second of two that are one class. */
struct TargetExps {
  float a, b, others, sum;
};

FASTMP_DEVICE TargetExps target_exps(const Totals& row, const Targets& targets) {
  const auto exp_of = [&](int32_t y, float z) {
    return y < 0 ? 0.0f : exp2_fast((z - row.sums.max) * kLog2E);
  };
  const float a = exp_of(targets.a, row.z_a);
  const float b = targets.a == targets.b ? 0.0f : exp_of(targets.b, row.z_b);
  const float others = row.sums.others + (a < b ? a : b);
  return {a, b, others, others + (a < b ? b : a)};
}

/* Loss and statistics of a row, by one thread. Where the larger target is the largest logit its
 * loss is log(1 + others), however small that is. */
template <class T>
FASTMP_DEVICE void store_loss(const fastmp_ring_args& args, const Totals& row, const TargetExps& e,
                              const Plan<T>& plan) {
  const bool is_max = e.a == 1.0f || e.b == 1.0f;
  const float log_sum_exp = is_max ? log_1_plus(e.others) : log_of(e.sum);
  float smooth_loss = 0.0f;
  if (args.smooth_prob > 0.0f) {
    const float total =
        args.weight == nullptr ? static_cast<float>(args.classes) : read_only(args.weight_total);
    smooth_loss = args.smooth_prob * (total * log_sum_exp - row.sums.below);
  }
  const auto nll = [&](int32_t y, float z) {
    return y < 0 ? 0.0f : log_sum_exp - (z - row.sums.max);
  };
  const Targets targets = plan.targets;
  const RowWeights w = plan.weights;
  args.loss[plan.row] =
      target_loss(args, targets.a, w.mix_a, w.w_a, nll(targets.a, row.z_a), smooth_loss) +
      target_loss(args, targets.b, w.mix_b, w.w_b, nll(targets.b, row.z_b), smooth_loss);
  args.stats[2 * plan.row] = row.sums.max;
  args.stats[2 * plan.row + 1] = e.others;
}

/* Ends the sums of a row, stores its loss, and begins its gradient. */
template <class T>
FASTMP_DEVICE Gradient finish_row(const fastmp_ring_args& args, const Totals& row,
                                  const Plan<T>& plan, bool stores_loss) {
  const Targets targets = plan.targets;
  const TargetExps e = target_exps(row, targets);
  if (stores_loss) store_loss(args, row, e, plan);
  const RowCoefs k = plan.coefs;
  const float inv_sum_exp = reciprocal(e.sum);
  const float at_a = target_gradient(k.a, e.a, row.sums.others + e.b, inv_sum_exp);
  const float at_b = target_gradient(k.b, e.b, row.sums.others + e.a, inv_sum_exp);
  const Reference reference = reference_to(row.sums.max);
  const float softmax = k.softmax * inv_sum_exp * exp2_fast(-reference.exponent(row.sums.max));
  return {reference, softmax, k.smooth, at_a, targets.a == targets.b ? at_a : at_b};
}

}  // namespace fastmp
#endif
