/* Loss and gradient of a row, from its sums. Formulas: loss.cu and ../common/loss.h. */
#ifndef FASTMP_LOSS_GRADIENT_H
#define FASTMP_LOSS_GRADIENT_H

#include "../common/loss.h"
#include "loss_sums.h"

namespace fastmp {

struct Gradient {
  float row_max, softmax, smooth_coef; /* softmax: what e is multiplied with */
  Targets targets;
  float at_a, at_b;
};

template <class K>
FASTMP_DEVICE float gradient_at(const Gradient& g, float z, int32_t at, const float* weight) {
  const float e = exp2_fast((z - g.row_max) * kLog2E);
  if constexpr (K::smooth == Smooth::none) return e * g.softmax;
  const float w = K::smooth == Smooth::weighted ? read_only(weight + at) : 1.0f;
  return multiply_add(e, g.softmax, -(g.smooth_coef * w));
}

/* Of n classes from `at` on. */
template <class K, int n>
FASTMP_DEVICE void gradients_at(const Gradient& g, float (&z)[n], int32_t at, const float* weight) {
  for (int i = 0; i < n; ++i) z[i] = gradient_at<K>(g, z[i], at + i, weight);
  if (is_among<n>(g.targets.a, at) || is_among<n>(g.targets.b, at)) {
    for (int i = 0; i < n; ++i) {
      if (g.targets.a == at + i) z[i] = g.at_a;
      if (g.targets.b == at + i) z[i] = g.at_b;
    }
  }
}

/* What is the same for all rows. */
struct Constants {
  float inv_divisor_a, inv_divisor_b, grad_output, weight_total;
};

/* λ and class weights of a row; a target out of range weighs NaN: loud, and no crash. */
struct RowWeights {
  float mix_a, mix_b, w_a, w_b;
};

FASTMP_DEVICE float class_weight(const float* weight, int32_t y) {
  if (y == kIgnored) return 0.0f;
  if (y == kOutOfRange) return float_from_bits(0x7fc00000u);
  return weight == nullptr ? 1.0f : read_only(weight + y);
}

FASTMP_DEVICE RowWeights load_row_weights(const fastmp_ring_args& args, const Constants& constants,
                                          const Targets& targets, int32_t row) {
  float lam = 1.0f;
  if (args.target_b != nullptr) lam = read_only(args.lam + row * args.lam_stride);
  const float mix_b = (1.0f - lam) * constants.inv_divisor_b;
  return {lam * constants.inv_divisor_a, args.target_b == nullptr ? 0.0f : mix_b,
          class_weight(args.weight, targets.a), class_weight(args.weight, targets.b)};
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
FASTMP_DEVICE void store_loss(const fastmp_ring_args& args, const Constants& constants,
                              const Totals& row, const TargetExps& e, const Targets& targets,
                              const RowWeights& w, int32_t index) {
  const bool is_max = e.a == 1.0f || e.b == 1.0f;
  const float log_sum_exp = is_max ? log_1_plus(e.others) : log_of(e.sum);
  float smooth_loss = 0.0f;
  if (args.smooth_prob > 0.0f) {
    smooth_loss = args.smooth_prob * (constants.weight_total * log_sum_exp - row.sums.below);
  }
  const auto nll = [&](int32_t y, float z) {
    return y < 0 ? 0.0f : log_sum_exp - (z - row.sums.max);
  };
  args.loss[index] =
      target_loss(args, targets.a, w.mix_a, w.w_a, nll(targets.a, row.z_a), smooth_loss) +
      target_loss(args, targets.b, w.mix_b, w.w_b, nll(targets.b, row.z_b), smooth_loss);
  args.stats[2 * index] = row.sums.max;
  args.stats[2 * index + 1] = e.others;
}

/* Ends the sums of a row, stores its loss, and begins its gradient. */
FASTMP_DEVICE Gradient finish_row(const fastmp_ring_args& args, const Constants& constants,
                                  const Totals& row, const Targets& targets, const RowWeights& w,
                                  int32_t index, bool stores_loss) {
  const TargetExps e = target_exps(row, targets);
  if (stores_loss) store_loss(args, constants, row, e, targets, w, index);
  const float g = constants.grad_output, total = constants.weight_total;
  const LossCoefs<float> k = loss_coefs(targets.a == kIgnored ? 0.0f : g * w.mix_a,
                                        targets.b == kIgnored ? 0.0f : g * w.mix_b, w.w_a, w.w_b,
                                        args.target_prob, args.smooth_prob, total);
  const float inv_sum_exp = reciprocal(e.sum);
  const bool same = targets.a == targets.b;
  const float coef_a = same ? k.target_coef_a + k.target_coef_b : k.target_coef_a;
  const float at_a = target_gradient(coef_a, same ? 0.0f : k.target_coef_b, k.smooth_coef, w.w_a,
                                     total, e.a, row.sums.others + e.b, inv_sum_exp);
  const float at_b = target_gradient(k.target_coef_b, k.target_coef_a, k.smooth_coef, w.w_b, total,
                                     e.b, row.sums.others + e.a, inv_sum_exp);
  return {row.sums.max,      k.softmax_coef * inv_sum_exp, k.smooth_coef, targets, at_a,
          same ? at_a : at_b};
}

}  // namespace fastmp
#endif
