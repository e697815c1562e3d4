/* One row of the loss: its targets, the scan over its logits, its loss and its gradient. The
 * formulas and the bytes moved are in loss.cpp. */
#ifndef FASTMP_LOSS_ROW_H
#define FASTMP_LOSS_ROW_H

#include <math.h>

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

  float weight_of(int64_t y) const { return args.weight == nullptr ? 1.0f : args.weight[y]; }
};

/* A target of a row; where it is ignored mix_weight is 0. */
struct Target {
  int64_t y;
  bool valid;
  double mix_weight;
};
struct Targets {
  Target a, b;
};

Targets targets_of(const Problem& problem, int64_t row) {
  const fastmp_loss_args& args = problem.args;
  Targets t = {{args.target_a[row], false, 0.0}, {args.ignore_index, false, 0.0}};
  double lam = 1.0;
  if (args.target_b != nullptr) {
    lam = static_cast<double>(args.lam[row * args.lam_stride]);
    t.b.y = args.target_b[row];
    t.b.valid = t.b.y != args.ignore_index;
    if (t.b.valid) t.b.mix_weight = (1.0 - lam) * problem.inv_divisor_b;
  }
  t.a.valid = t.a.y != args.ignore_index;
  if (t.a.valid) t.a.mix_weight = lam * problem.inv_divisor_a;
  return t;
}

/* ---- forward over one row ---- */

/* What the forward keeps of a row. Each block is taken against the row_max known by then, its
 * block_max: exp(z - block_max). */
struct RowSums {
  float row_max;
  double sum_exp; /* Σ exp(z - row_max) */
  double shifted; /* Σ w (z - block_max) */
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

/* e = exp(z - block_max); adds up e, and with smoothing w (z - block_max). Prefetches the next
 * block or row: the hardware's prefetchers stop at every 4 KiB page, and a row of 1,000 fp32 logits
 * is one page. 15 to 25% of forward and backward. */
template <class T, Smooth smooth>
void exp_block(const T* z, const float* weight, float* __restrict e, int64_t n, float block_max,
               RowSums* row) {
  Vec sums[2] = {}, shifted[2] = {};
  const auto step = [&](int64_t i, int lane) {
    __builtin_prefetch(z + i + n);
    const Vec x = load(z + i) - block_max;
    const Vec y = exp_nonpos(x);
    save(y, e + i);
    sums[lane] += y;
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
    const Vec y = exp_nonpos(load_part(z + i, rest, -__builtin_inff()) - block_max);
    save_part(y, e + i, rest);
    sums[1] += y;
    const Vec x = load_part(z + i, rest, block_max) - block_max;
    if (smooth == Smooth::equal) shifted[1] += x;
    if (smooth == Smooth::weighted) shifted[1] += x * load_part(weight + i, rest, 0.0f);
  }
  row->sum_exp += static_cast<double>(sum_of_lanes(sums[0] + sums[1]));
  if (smooth != Smooth::none) {
    row->shifted += static_cast<double>(sum_of_lanes(shifted[0] + shifted[1]));
  }
}

/* e_stride 0: the exponentials are not kept, each block overwrites the last. */
template <class T, Smooth smooth>
RowSums online_softmax(const T* z, const float* weight, int64_t classes, float* e, int64_t e_stride,
                       float* block_max) {
  RowSums row = {-__builtin_inff(), 0.0, 0.0};
  for (int64_t at = 0, block = 0; at < classes; at += kBlock, ++block) {
    const int64_t n = min_of(kBlock, classes - at);
    const float max = max_logit(z + at, n);
    if (max > row.row_max) {
      if (block > 0) { /* before that the sum is 0: no exponential for a row of one block */
        row.sum_exp *= exp(static_cast<double>(row.row_max) - static_cast<double>(max));
      }
      row.row_max = max;
    }
    /* While all is -inf any finite block_max gives exp 0, and not NaN as -inf would. */
    block_max[block] = row.row_max == -__builtin_inff() ? 0.0f : row.row_max;
    exp_block<T, smooth>(z + at, weight == nullptr ? nullptr : weight + at, e + block * e_stride, n,
                         block_max[block], &row);
  }
  return row;
}

double row_loss(const Problem& problem, const Targets& targets, const RowSums& row,
                const float* block_max, double z_a, double z_b) {
  const double log_sum_exp = log(row.sum_exp);
  const double row_max = static_cast<double>(row.row_max);
  double smooth_loss = 0.0;
  if (problem.smooth_prob > 0.0) {
    const int64_t blocks = ceil_div(problem.args.classes, kBlock);
    for (int64_t block = 0; block < blocks; ++block) {
      const double above = row_max - static_cast<double>(block_max[block]);
      smooth_loss += problem.block_weights[block] * (above + log_sum_exp);
    }
    smooth_loss = problem.smooth_prob * (smooth_loss - row.shifted);
  }
  const auto target_loss = [&](const Target& t, double z_y) {
    const double w = static_cast<double>(problem.weight_of(t.y));
    return t.mix_weight * (problem.target_prob * w * (row_max - z_y + log_sum_exp) + smooth_loss);
  };
  double loss = 0.0;
  if (targets.a.valid) loss += target_loss(targets.a, z_a);
  if (targets.b.valid) loss += target_loss(targets.b, z_b);
  return loss;
}

/* ---- the gradient of one row ---- */

struct GradientCoefs {
  double softmax_coef, smooth_coef, target_coef_a, target_coef_b;
};

GradientCoefs gradient_coefs(const Problem& problem, const Targets& targets, double grad_output) {
  const auto target_coef = [&](const Target& t) {
    if (!t.valid) return 0.0;
    const double w = static_cast<double>(problem.weight_of(t.y));
    return grad_output * t.mix_weight * problem.target_prob * w;
  };
  GradientCoefs k;
  k.target_coef_a = target_coef(targets.a);
  k.target_coef_b = target_coef(targets.b);
  k.smooth_coef = grad_output * (targets.a.mix_weight + targets.b.mix_weight) * problem.smooth_prob;
  k.softmax_coef = k.target_coef_a + k.target_coef_b + k.smooth_coef * problem.weight_total;
  return k;
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
                       double softmax_a, double softmax_b, T* grad) {
  const bool same = targets.a.valid && targets.b.valid && targets.a.y == targets.b.y;
  const auto value = [&](const Target& t, double softmax, double coef) {
    const double w = static_cast<double>(problem.weight_of(t.y));
    return static_cast<float>(k.softmax_coef * softmax - k.smooth_coef * w - coef);
  };
  if (targets.a.valid) {
    store(value(targets.a, softmax_a, k.target_coef_a + (same ? k.target_coef_b : 0.0)),
          &grad[targets.a.y]);
  }
  if (targets.b.valid && !same) {
    store(value(targets.b, softmax_b, k.target_coef_b), &grad[targets.b.y]);
  }
}

template <class T>
void store_gradient(const Problem& problem, const Targets& targets, const RowSums& row,
                    const float* e, const float* block_max, double grad_output, T* grad) {
  const fastmp_loss_args& args = problem.args;
  const GradientCoefs k = gradient_coefs(problem, targets, grad_output);
  const float smooth_coef = static_cast<float>(k.smooth_coef);
  const auto factor_of = [&](int64_t block) {
    const float below = block_max[block];
    const double rescale = below == row.row_max
                               ? 1.0
                               : exp(static_cast<double>(below) - static_cast<double>(row.row_max));
    return rescale / row.sum_exp;
  };
  for (int64_t at = 0, block = 0; at < args.classes; at += kBlock, ++block) {
    const int64_t n = min_of(kBlock, args.classes - at);
    const float factor = static_cast<float>(k.softmax_coef * factor_of(block));
    if (args.weight != nullptr) {
      gradient_of_exp<T, true>(e + at, args.weight + at, grad + at, n, factor, smooth_coef);
    } else {
      gradient_of_exp<T, false>(e + at, nullptr, grad + at, n, factor, smooth_coef);
    }
  }
  const auto softmax_at = [&](const Target& t) {
    return t.valid ? static_cast<double>(e[t.y]) * factor_of(t.y / kBlock) : 0.0;
  };
  fix_target_logits(problem, targets, k, softmax_at(targets.a), softmax_at(targets.b), grad);
}

}  // namespace
}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
