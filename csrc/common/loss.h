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
 * Where a network is sure of a target t, softmax_t - 1 is a small difference of two numbers near 1.
 * With others = the sum of the exponentials of all classes but t it is -others / (others + e_t),
 * exact to rounding:
 *
 *   grad_t  = (away e_t - towards others) / (others + e_t)
 *   towards = target_coef_t + smooth_coef w_t
 *   away    = softmax_coef - towards, as a sum without this difference */
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

template <class Real>
struct TargetCoefs {
  Real away, towards;
};

/* Of a target t of class weight w. coef: its target_coef; other_coef: that of the other target, if
 * that is another class. */
template <class Real>
FASTMP_FN TargetCoefs<Real> target_coefs(Real coef, Real other_coef, Real smooth_coef, Real w,
                                         Real weight_total) {
  return {other_coef + smooth_coef * (weight_total - w), coef + smooth_coef * w};
}

/* The gradient at a target. */
template <class Real>
FASTMP_FN Real target_gradient(const TargetCoefs<Real>& k, Real exp_t, Real others,
                               Real inv_sum_exp) {
  return (k.away * exp_t - k.towards * others) * inv_sum_exp;
}

}  // namespace fastmp
#endif
