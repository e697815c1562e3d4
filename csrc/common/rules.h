/* The update rules: what one step does to one element. Each rule is written once, here; the CPU
 * library and the CUDA kernel compile the same source.
 *
 * A rule is a struct with
 *   number        by which the class in fastmp/optim names it and fastmp_hyper carries it,
 *   states        how many states an element has; apply() sees them as fp32, and how they are kept
 *                 is a policy beside the rule (state_kinds.h),
 *   quantity(s)   what state s is, which decides how a narrow kind rounds it,
 *   prepare()     the hyperparameters of a group at a step, reduced to a few fp32 numbers, in fp64,
 *   apply()       p, states <- one element's update, branch-free so that it vectorises; roots and
 *                 ratios are those of an arithmetic, Ieee or one with the same bits.
 * grad_factor carries the unscaling, the clipping and the sign of maximize, in one multiplication.
 * A new rule is one struct, listed in FASTMP_RULES, and one class in fastmp/optim. */
#ifndef FASTMP_RULES_H
#define FASTMP_RULES_H

#include "state_kinds.h"
#ifndef __CUDACC_RTC__
#include <math.h>
#endif

namespace fastmp {

struct Ieee {
  FASTMP_FN float root(float x) { return sqrtf(x); }
  FASTMP_FN float ratio(float a, float b) { return a / b; }
};

/* Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), as torch.optim.adam defines them:
 *   p *= 1 - lr wd                    (decoupled)    or    g += wd p
 *   m += (1 - b1)(g - m),  v = b2 v + (1 - b2) g^2
 *   p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
 * AMSGrad puts the running maximum of v under the root. */
template <bool amsgrad>
struct AdamRule {
  static constexpr int number = amsgrad ? 1 : 0;
  static constexpr int states = amsgrad ? 3 : 2;
  FASTMP_FN constexpr Quantity quantity(int s) {
    return s == 0 ? Quantity::kSigned : s == 1 ? Quantity::kSquare : Quantity::kMaximum;
  }

  struct Coefficients {
    float grad_factor, decay, l2, rate1, beta2, rate2, root_correction, eps, step_size;
  };

  FASTMP_FN Coefficients prepare(const fastmp_hyper& h, double step, float grad_factor) {
    const double correction1 = 1.0 - pow(h.beta1, step);
    const double correction2 = 1.0 - pow(h.beta2, step);
    Coefficients k;
    k.grad_factor = h.maximize != 0.0 ? -grad_factor : grad_factor;
    k.decay = static_cast<float>(h.decoupled != 0.0 ? 1.0 - h.lr * h.weight_decay : 1.0);
    k.l2 = static_cast<float>(h.decoupled != 0.0 ? 0.0 : h.weight_decay);
    k.rate1 = static_cast<float>(1.0 - h.beta1);
    k.beta2 = static_cast<float>(h.beta2);
    k.rate2 = static_cast<float>(1.0 - h.beta2);
    k.root_correction = static_cast<float>(1.0 / sqrt(correction2));
    k.eps = static_cast<float>(h.eps);
    k.step_size = static_cast<float>(h.lr / correction1);
    return k;
  }

  template <class Arithmetic>
  FASTMP_FN void apply(float& p, float g, float& m, float& v, float& v_max, const Coefficients& k,
                       Arithmetic& arithmetic) {
    g = g * k.grad_factor + k.l2 * p;
    m = m + (g - m) * k.rate1;
    /* The square of a gradient below 1e-19 is subnormal, in (g * rate2) * g within a multiply-add
     * it is never rounded: on Intel CPUs arithmetic on subnormal numbers takes a hundred cycles. */
    v = multiply_add(g * k.rate2, g, v * k.beta2);
    float second = v;
    if (amsgrad) second = v_max = v_max < v ? v : v_max;
    const float denominator = arithmetic.root(second) * k.root_correction + k.eps;
    p = p * k.decay - k.step_size * arithmetic.ratio(m, denominator);
  }
};

/* SGD as torch.optim.sgd defines it:
 *   g += wd p;  b = mu b + (1 - dampening) g  (b = g at the first step)
 *   p -= lr (nesterov ? g + mu b : b) */
template <bool momentum>
struct SgdRule {
  static constexpr int number = momentum ? 3 : 2;
  static constexpr int states = momentum ? 1 : 0;
  FASTMP_FN constexpr Quantity quantity(int) { return Quantity::kSigned; }

  struct Coefficients {
    float grad_factor, l2, momentum_keep, momentum_take, from_grad, from_buffer;
  };

  FASTMP_FN Coefficients prepare(const fastmp_hyper& h, double step, float grad_factor) {
    const bool first = step <= 1.0;
    const bool nesterov = h.nesterov != 0.0;
    Coefficients k;
    k.grad_factor = h.maximize != 0.0 ? -grad_factor : grad_factor;
    k.l2 = static_cast<float>(h.weight_decay);
    k.momentum_keep = static_cast<float>(first ? 0.0 : h.beta1);
    k.momentum_take = static_cast<float>(first ? 1.0 : 1.0 - h.dampening);
    k.from_grad = static_cast<float>(!momentum || nesterov ? h.lr : 0.0);
    k.from_buffer = static_cast<float>(nesterov ? h.lr * h.beta1 : h.lr);
    return k;
  }

  template <class Arithmetic>
  FASTMP_FN void apply(float& p, float g, float& buffer, float&, float&, const Coefficients& k,
                       Arithmetic&) {
    g = g * k.grad_factor + k.l2 * p;
    if (momentum) {
      buffer = buffer * k.momentum_keep + g * k.momentum_take;
      p = p - (g * k.from_grad + buffer * k.from_buffer);
    } else {
      p = p - g * k.from_grad;
    }
  }
};

/* Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2):
 *   p -= lr (sign(b1 m + (1 - b1) g) + wd p),  m = b2 m + (1 - b2) g */
struct LionRule {
  static constexpr int number = 4;
  static constexpr int states = 1;
  FASTMP_FN constexpr Quantity quantity(int) { return Quantity::kSigned; }

  struct Coefficients {
    float grad_factor, decay, beta1, rate1, beta2, rate2, lr;
  };

  FASTMP_FN Coefficients prepare(const fastmp_hyper& h, double, float grad_factor) {
    Coefficients k;
    k.grad_factor = h.maximize != 0.0 ? -grad_factor : grad_factor;
    k.decay = static_cast<float>(1.0 - h.lr * h.weight_decay);
    k.beta1 = static_cast<float>(h.beta1);
    k.rate1 = static_cast<float>(1.0 - h.beta1);
    k.beta2 = static_cast<float>(h.beta2);
    k.rate2 = static_cast<float>(1.0 - h.beta2);
    k.lr = static_cast<float>(h.lr);
    return k;
  }

  template <class Arithmetic>
  FASTMP_FN void apply(float& p, float g, float& m, float&, float&, const Coefficients& k,
                       Arithmetic&) {
    g = g * k.grad_factor;
    const float direction = m * k.beta1 + g * k.rate1;
    const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : 0.0f;
    p = p * k.decay - sign * k.lr;
    m = m * k.beta2 + g * k.rate2;
  }
};

/* Muon (Jordan et al. 2024), as torch.optim.Muon defines it, before and after the iteration that
 * orthogonalises the direction:
 *   m += (1 - mu)(g - m),  direction = nesterov ? g + mu (m - g) : m
 *   p = (1 - lr wd) p - lr orthogonalised
 * The first writes the direction in place of p. */
struct MuonMomentumRule {
  static constexpr int number = 5;
  static constexpr int states = 1;
  FASTMP_FN constexpr Quantity quantity(int) { return Quantity::kSigned; }

  struct Coefficients {
    float grad_factor, rate, from_grad, from_buffer;
  };

  FASTMP_FN Coefficients prepare(const fastmp_hyper& h, double, float grad_factor) {
    const bool nesterov = h.nesterov != 0.0;
    Coefficients k;
    k.grad_factor = grad_factor;
    k.rate = static_cast<float>(1.0 - h.beta1);
    k.from_grad = static_cast<float>(nesterov ? 1.0 - h.beta1 : 0.0);
    k.from_buffer = static_cast<float>(nesterov ? h.beta1 : 1.0);
    return k;
  }

  template <class Arithmetic>
  FASTMP_FN void apply(float& p, float g, float& m, float&, float&, const Coefficients& k,
                       Arithmetic&) {
    g = g * k.grad_factor;
    m = m + (g - m) * k.rate;
    p = g * k.from_grad + m * k.from_buffer;
  }
};

struct MuonRule {
  static constexpr int number = 6;
  static constexpr int states = 0;
  FASTMP_FN constexpr Quantity quantity(int) { return Quantity::kSigned; }

  struct Coefficients {
    float decay, lr;
  };

  FASTMP_FN Coefficients prepare(const fastmp_hyper& h, double, float) {
    Coefficients k;
    k.decay = static_cast<float>(1.0 - h.lr * h.weight_decay);
    k.lr = static_cast<float>(h.lr);
    return k;
  }

  template <class Arithmetic>
  FASTMP_FN void apply(float& p, float g, float&, float&, float&, const Coefficients& k,
                       Arithmetic&) {
    p = p * k.decay - g * k.lr;
  }
};

#define FASTMP_RULES(X) \
  X(AdamRule<false>)    \
  X(AdamRule<true>)     \
  X(SgdRule<false>)     \
  X(SgdRule<true>)      \
  X(LionRule)           \
  X(MuonMomentumRule)   \
  X(MuonRule)

/* The rule with a number: RuleOf<4>::Rule is LionRule. */
template <int number>
struct RuleOf;
#define FASTMP_NUMBERED(Struct)   \
  template <>                     \
  struct RuleOf<Struct::number> { \
    typedef Struct Rule;          \
  };
FASTMP_RULES(FASTMP_NUMBERED)
#undef FASTMP_NUMBERED

}  // namespace fastmp
#endif
