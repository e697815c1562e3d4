/* One row of the loss: its targets, the scan over its logits, its loss and its gradient. The
 * formulas and the bytes moved are in loss.cpp. */
#ifndef FASTMP_LOSS_ROW_H
#define FASTMP_LOSS_ROW_H

#include <math.h>

#include "../common/loss.h"
#include "vec.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

constexpr int64_t kBlock = 2048; /* logits taken at a time: 8 KiB of fp32 */
enum class Smooth { none, equal, weighted };

/* One call, for all of its rows. */
struct Problem {
  const fastmp_loss_args& args;
  double inv_divisor_a, inv_divisor_b;
  double target_prob; /* 1-ε */
  double smooth_prob; /* ε/C */
  double weight_total;
  const double* block_weights; /* Σ w over each block */
  double* row_losses;
};

/* A target of a row; where it is ignored mix_weight is 0. */
struct Target {
  int64_t y;
  bool valid;
  double mix_weight;
  double w; /* of its class */
  double z; /* its logit */
};
/* larger: the one with the larger logit. Where both are one class, that has the weight of both. */
struct Targets {
  Target larger, other;
};

template <class T>
Targets targets_of(const Problem& problem, int64_t row, const T* z) {
  const fastmp_loss_args& args = problem.args;
  const auto target = [&](int64_t y, double mix_weight) {
    if (y == args.ignore_index) return Target{-1, false, 0.0, 0.0, 0.0};
    const double w = args.weight == nullptr ? 1.0 : static_cast<double>(args.weight[y]);
    return Target{y, true, mix_weight, w, static_cast<double>(to_float(z[y]))};
  };
  const bool pair = args.target_b != nullptr;
  const double lam = pair ? static_cast<double>(args.lam[row * args.lam_stride]) : 1.0;
  Target a = target(args.target_a[row], lam * problem.inv_divisor_a);
  if (!pair) return {a, target(args.ignore_index, 0.0)};
  Target b = target(args.target_b[row], (1.0 - lam) * problem.inv_divisor_b);
  if (a.valid && a.y == b.y) {
    a.mix_weight += b.mix_weight;
    b = target(args.ignore_index, 0.0);
  }
  const bool swap = b.valid && (!a.valid || b.z > a.z);
  return swap ? Targets{b, a} : Targets{a, b};
}

/* ---- forward over one row ---- */

/* What the forward keeps of a row. Each block is taken against the row_max known by then, its
 * block_max: exp(z - block_max). */
struct RowSums {
  float row_max;
  double others;  /* Σ exp(z - row_max) without the larger target */
  double larger;  /* exp(z - row_max) of the larger target */
  double shifted; /* Σ w (z - block_max) */

  double sum_exp() const { return others + larger; }
};

template <class T>
float max_logit(const T* z, int64_t n) {
  const Vec lowest = broadcast(-__builtin_inff());
  Vec best[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int lane = 0; lane < 4; ++lane)
      best[lane] = larger(load(z + i + lane * kWidth), best[lane]);
  }
  for (; i + kWidth <= n; i += kWidth) best[0] = larger(load(z + i), best[0]);
  if (i < n) best[1] = larger(load_part(z + i, n - i, -__builtin_inff()), best[1]);
  return largest_lane(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

/* e = exp(z - block_max); with smoothing adds up w (z - block_max). Prefetches the next
 * block or row: the hardware's prefetchers stop at every 4 KiB page, and a row of 1,000 fp32 logits
 * is one page. 15 to 25% of forward and backward. */
template <class T, Smooth smooth>
void exp_block(const T* z, const float* weight, float* __restrict e, int64_t n, float block_max,
               RowSums* row) {
  Vec shifted[2] = {};
  const auto step = [&](int64_t i, int lane) {
    __builtin_prefetch(z + i + n);
    const Vec x = load(z + i) - block_max;
    save(exp_nonpos(x), e + i);
    if (smooth == Smooth::equal) shifted[lane] += x;
    if (smooth == Smooth::weighted) shifted[lane] += x * load(weight + i);
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    step(i, 0);
    step(i + kWidth, 1);
  }
  if (i + kWidth <= n) {
    step(i, 0);
    i += kWidth;
  }
  if (i < n) {
    /* Padding of -inf is exp 0; padding of block_max adds 0 to the shifted sum. */
    const int64_t rest = n - i;
    save(exp_nonpos(load_part(z + i, rest, -__builtin_inff()) - block_max), e + i);
    const Vec x = load_part(z + i, rest, block_max) - block_max;
    if (smooth == Smooth::equal) shifted[1] += x;
    if (smooth == Smooth::weighted) shifted[1] += x * load_part(weight + i, rest, 0.0f);
  }
  if (smooth != Smooth::none) {
    row->shifted += static_cast<double>(sum_of_lanes(shifted[0] + shifted[1]));
  }
}

/* Σ e; padding is 0. A pass of its own over what lies in L1. */
double sum_block(const float* e, int64_t n) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += load(e + i + lane * kWidth);
  }
  for (; i < n; i += kWidth) sums[0] += load(e + i);
  return static_cast<double>(sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

/* Σ e without e[out]. A whole vector is stored and stored back: loading it would wait for the store
 * of one lane. */
double sum_block_without(float* e, int64_t n, int64_t out) {
  float* at = e + out / kWidth * kWidth;
  const Vec all = load(at);
  save(without_lane(all, out % kWidth), at);
  const double sum = sum_block(e, n);
  save(all, at);
  return sum;
}

/* e_stride 0: the exponentials are not kept, each block overwrites the last. */
template <class T, Smooth smooth>
RowSums online_softmax(const T* z, const float* weight, int64_t classes, int64_t larger, float* e,
                       int64_t e_stride, float* block_max) {
  RowSums row = {-__builtin_inff(), 0.0, 0.0, 0.0};
  for (int64_t at = 0, block = 0; at < classes; at += kBlock, ++block) {
    const int64_t n = min_of(kBlock, classes - at);
    const float max = max_logit(z + at, n);
    if (max > row.row_max) {
      if (block > 0) { /* before that the sum is 0: no exponential for a row of one block */
        const double factor = exp(static_cast<double>(row.row_max) - static_cast<double>(max));
        row.others *= factor;
        row.larger *= factor;
      }
      row.row_max = max;
    }
    /* While all is -inf any finite block_max gives exp 0, and not NaN as -inf would. */
    block_max[block] = row.row_max == -__builtin_inff() ? 0.0f : row.row_max;
    float* block_e = e + block * e_stride;
    exp_block<T, smooth>(z + at, weight == nullptr ? nullptr : weight + at, block_e, n,
                         block_max[block], &row);
    if (at <= larger && larger < at + n) {
      row.others += sum_block_without(block_e, n, larger - at);
      row.larger = static_cast<double>(block_e[larger - at]);
    } else {
      row.others += sum_block(block_e, n);
    }
  }
  return row;
}

/* log(1 + x), x >= 0: below 1e-8 the next term of the series is less than fp32 holds. */
double log_1_plus(double x) {
  return x < 1e-8 ? x : log(1.0 + x);
}

double row_loss(const Problem& problem, const Targets& targets, const RowSums& row,
                const float* block_max) {
  const double row_max = static_cast<double>(row.row_max);
  const double log_sum_exp =
      targets.larger.z == row_max ? log_1_plus(row.others) : log(row.sum_exp());
  double smooth_loss = 0.0;
  if (problem.smooth_prob > 0.0) {
    const int64_t blocks = ceil_div(problem.args.classes, kBlock);
    for (int64_t block = 0; block < blocks; ++block) {
      const double above = row_max - static_cast<double>(block_max[block]);
      smooth_loss += problem.block_weights[block] * (above + log_sum_exp);
    }
    smooth_loss = problem.smooth_prob * (smooth_loss - row.shifted);
  }
  const auto target_loss = [&](const Target& t) {
    if (!t.valid) return 0.0;
    return t.mix_weight * (problem.target_prob * t.w * (row_max - t.z + log_sum_exp) + smooth_loss);
  };
  return target_loss(targets.larger) + target_loss(targets.other);
}

/* ---- the gradient of one row ---- */

typedef LossCoefs<double> GradientCoefs; /* a: the larger target, b: the other */

GradientCoefs gradient_coefs(const Problem& problem, const Targets& targets, double grad_output) {
  const Target &a = targets.larger, &b = targets.other;
  return loss_coefs(grad_output * a.mix_weight, grad_output * b.mix_weight, a.w, b.w,
                    problem.target_prob, problem.smooth_prob, problem.weight_total);
}

double grad_output_of(const fastmp_loss_args& args, int64_t row) {
  return args.grad_output == nullptr
             ? 1.0
             : static_cast<double>(args.grad_output[row * args.grad_output_stride]);
}

/* grad = e * factor - smooth_coef * w. The first product is the one that is not rounded: it may be
 * subnormal. */
template <class T, bool weighted>
void gradient_of_exp(const float* e, const float* weight, T* __restrict grad, int64_t n,
                     float factor, float smooth_coef) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    __builtin_prefetch(grad + i + n, 1);
    const Vec w = weighted ? load(weight + i) * smooth_coef : broadcast(smooth_coef);
    save(multiply_add(load(e + i), broadcast(factor), -w), grad + i);
  }
  if (i < n) {
    const Vec w =
        weighted ? load_part(weight + i, n - i, 0.0f) * smooth_coef : broadcast(smooth_coef);
    save_part(multiply_add(load_part(e + i, n - i, 0.0f), broadcast(factor), -w), grad + i, n - i);
  }
}

/* grad = exp(z - row_max) * factor - smooth_coef * w. */
template <class T, bool weighted>
void gradient_of_logits(const T* z, const float* weight, T* __restrict grad, int64_t n,
                        float row_max, float factor, float smooth_coef) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec w = weighted ? load(weight + i) * smooth_coef : broadcast(smooth_coef);
    save(multiply_add(exp_nonpos(load(z + i) - row_max), broadcast(factor), -w), grad + i);
  }
  if (i < n) {
    const Vec w =
        weighted ? load_part(weight + i, n - i, 0.0f) * smooth_coef : broadcast(smooth_coef);
    const Vec e = exp_nonpos(load_part(z + i, n - i, row_max) - row_max);
    save_part(multiply_add(e, broadcast(factor), -w), grad + i, n - i);
  }
}

/* The targets' logits again, in fp64: near softmax 1 their gradient is a small difference. */
template <class T>
void fix_target_logits(const Problem& problem, const Targets& targets, const GradientCoefs& k,
                       const RowSums& row, double exp_other, T* grad) {
  const double per_sum = 1.0 / row.sum_exp();
  const auto fix = [&](const Target& t, double coef, double other_coef, double exp_t,
                       double others) {
    const auto at_t = target_coefs(coef, other_coef, k.smooth_coef, t.w, problem.weight_total);
    const double g = target_gradient(at_t, exp_t, others, per_sum);
    store(static_cast<float>(g), &grad[t.y]);
  };
  fix(targets.larger, k.target_coef_a, k.target_coef_b, row.larger, row.others);
  if (!targets.other.valid) return;
  fix(targets.other, k.target_coef_b, k.target_coef_a, exp_other, row.sum_exp() - exp_other);
}

template <class T>
void store_gradient(const Problem& problem, const Targets& targets, const RowSums& row,
                    const float* e, const float* block_max, double grad_output, T* grad) {
  const fastmp_loss_args& args = problem.args;
  const GradientCoefs k = gradient_coefs(problem, targets, grad_output);
  const float smooth_coef = static_cast<float>(k.smooth_coef);
  const double per_sum = k.softmax_coef / row.sum_exp();
  const auto rescale = [&](int64_t block) {
    const float below = block_max[block];
    return below == row.row_max
               ? 1.0
               : exp(static_cast<double>(below) - static_cast<double>(row.row_max));
  };
  for (int64_t at = 0, block = 0; at < args.classes; at += kBlock, ++block) {
    const int64_t n = min_of(kBlock, args.classes - at);
    const float factor = static_cast<float>(per_sum * rescale(block));
    if (args.weight != nullptr) {
      gradient_of_exp<T, true>(e + at, args.weight + at, grad + at, n, factor, smooth_coef);
    } else {
      gradient_of_exp<T, false>(e + at, nullptr, grad + at, n, factor, smooth_coef);
    }
  }
  const int64_t y = targets.other.y;
  const double exp_other =
      targets.other.valid ? static_cast<double>(e[y]) * rescale(y / kBlock) : 0.0;
  fix_target_logits(problem, targets, k, row, exp_other, grad);
}

}  // namespace
}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
