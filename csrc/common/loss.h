/* The gradient of a row of the loss, as far as it belongs to the row and its targets. For logits z
 * with targets a and b, class weights w and smoothing ε:
 *
 *   grad_c = softmax_coef softmax(z)_c - smooth_coef w_c - target_coef_a [c = a]
 *            - target_coef_b [c = b]
 *
 *   target_coef_y = grad_output mix_weight_y (1-ε) w_y
 *   smooth_coef   = grad_output (mix_weight_a + mix_weight_b) ε/C
 *   softmax_coef  = target_coef_a + target_coef_b + smooth_coef Σw
 *
 * A network is sure of what it has nearly learnt: softmax_y - 1 is then a small difference of two
 * numbers near 1. It is taken as -(sum of the other exponentials) / (sum of all): the exponentials
 * of the targets are left out of the sum over the row. */
#ifndef FASTMP_LOSS_H
#define FASTMP_LOSS_H

#include "numerics.h"

namespace fastmp {

template <class Real>
struct LossCoefs {
  Real softmax_coef, smooth_coef, target_coef_a, target_coef_b;
};

/* mix_a, mix_b: grad_output mix_weight_y; they and w are 0 where the target is ignored. */
template <class Real>
FASTMP_FN LossCoefs<Real> loss_coefs(Real mix_a, Real mix_b, Real w_a, Real w_b, Real target_prob,
                                     Real smooth_prob, Real weight_total) {
  LossCoefs<Real> k;
  k.target_coef_a = mix_a * target_prob * w_a;
  k.target_coef_b = mix_b * target_prob * w_b;
  k.smooth_coef = (mix_a + mix_b) * smooth_prob;
  k.softmax_coef = k.target_coef_a + k.target_coef_b + k.smooth_coef * weight_total;
  return k;
}

/* The gradient at a target y. coef: its target_coef; exp_y: exp(z_y - row_max); others: the sum of
 * the exponentials of all other classes. */
template <class Real>
FASTMP_FN Real target_gradient(const LossCoefs<Real>& k, Real coef, Real w, Real exp_y, Real others,
                               Real inv_sum_exp) {
  const Real pull = (k.softmax_coef - coef) * (exp_y * inv_sum_exp) - coef * (others * inv_sum_exp);
  return pull - k.smooth_coef * w;
}

}  // namespace fastmp
#endif
