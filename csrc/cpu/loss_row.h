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

/* What the rows of a call share. */
struct Problem {
  const fastmp_loss_args& args;
  double share_a, share_b; /* 1 / W: what a target's λ is multiplied with */
  double smooth_each;      /* ε/C */
  double weight_sum;       /* Σ w */
  const double* block_weights;
  double* row_losses;

  float weight_of(int64_t y) const { return args.weight == nullptr ? 1.0f : args.weight[y]; }
};

/* A target of a row: k_y, or 0 and counts = false where it is ignored. */
struct Target {
  int64_t y;
  bool counts;
  double share;
};
struct Targets {
  Target a, b;
};

static Targets targets_of(const Problem& problem, int64_t row) {
  const fastmp_loss_args& args = problem.args;
  Targets t = {{args.target_a[row], false, 0.0}, {args.ignore_index, false, 0.0}};
  double lam = 1.0;
  if (args.target_b != nullptr) {
    lam = static_cast<double>(args.lam[row * args.lam_stride]);
    t.b.y = args.target_b[row];
    t.b.counts = t.b.y != args.ignore_index;
    if (t.b.counts) t.b.share = (1.0 - lam) * problem.share_b;
  }
  t.a.counts = t.a.y != args.ignore_index;
  if (t.a.counts) t.a.share = lam * problem.share_a;
  return t;
}

/* ---- forward over one row ---- */

struct Scan {
  float largest;
  double sum;    /* Σ exp(z - largest) */
  double smooth; /* Σ w (z - reference of its block), over the blocks */
};

template <class T>
static float largest_of(const T* z, int64_t n) {
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

/* e = exp(z - reference); adds up e, and w (z - reference) if smoothing asks for it. Meanwhile it
 * fetches what comes next, the following block or row: the hardware's prefetchers stop at every 4
 * KiB page, and a row of 1,000 fp32 logits is one page. 15 to 25% of forward and backward. */
template <class T, Smooth smooth>
static void exp_block(const T* z, const float* weight, float* __restrict e, int64_t n,
                      float reference, double* sum, double* smooth_sum) {
  Vec sums[2] = {}, shifted[2] = {};
  const auto step = [&](int64_t i, int lane) {
    __builtin_prefetch(z + i + n);
    const Vec x = load(z + i) - reference;
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
    /* Padding of -inf is exp 0; padding of reference adds 0 to the shifted sum. */
    const int64_t rest = n - i;
    const Vec y = exp_nonpos(load_part(z + i, rest, -__builtin_inff()) - reference);
    save_part(y, e + i, rest);
    sums[1] += y;
    const Vec x = load_part(z + i, rest, reference) - reference;
    if (smooth == Smooth::equal) shifted[1] += x;
    if (smooth == Smooth::weighted) shifted[1] += x * load_part(weight + i, rest, 0.0f);
  }
  *sum += static_cast<double>(sum_of_lanes(sums[0] + sums[1]));
  if (smooth != Smooth::none) {
    *smooth_sum += static_cast<double>(sum_of_lanes(shifted[0] + shifted[1]));
  }
}

/* e_stride 0: the exponentials are not kept, each block overwrites the last. */
template <class T, Smooth smooth>
static Scan scan_row(const T* z, const float* weight, int64_t classes, float* e, int64_t e_stride,
                     float* references) {
  Scan scan = {-__builtin_inff(), 0.0, 0.0};
  for (int64_t at = 0, block = 0; at < classes; at += kBlock, ++block) {
    const int64_t n = min_of(kBlock, classes - at);
    const float largest = largest_of(z + at, n);
    if (largest > scan.largest) {
      if (block > 0) { /* before that the sum is 0: no exponential for a row of one block */
        scan.sum *= exp(static_cast<double>(scan.largest) - static_cast<double>(largest));
      }
      scan.largest = largest;
    }
    /* While all is -inf any finite reference gives exp 0, and not NaN as -inf would. */
    references[block] = scan.largest == -__builtin_inff() ? 0.0f : scan.largest;
    exp_block<T, smooth>(z + at, weight == nullptr ? nullptr : weight + at, e + block * e_stride, n,
                         references[block], &scan.sum, &scan.smooth);
  }
  return scan;
}

static double loss_of_row(const Problem& problem, const Targets& targets, const Scan& scan,
                          const float* references, double z_a, double z_b) {
  const fastmp_loss_args& args = problem.args;
  const double log_sum = log(scan.sum);
  const double largest = static_cast<double>(scan.largest);
  double smooth = 0.0;
  if (problem.smooth_each > 0.0) {
    const int64_t blocks = (args.classes + kBlock - 1) / kBlock;
    for (int64_t block = 0; block < blocks; ++block) {
      const double above = largest - static_cast<double>(references[block]);
      smooth += problem.block_weights[block] * (above + log_sum);
    }
    smooth = problem.smooth_each * (smooth - scan.smooth);
  }
  double loss = 0.0;
  if (targets.a.counts) {
    const double w = static_cast<double>(problem.weight_of(targets.a.y));
    loss += targets.a.share * ((1.0 - args.smoothing) * w * (largest - z_a + log_sum) + smooth);
  }
  if (targets.b.counts) {
    const double w = static_cast<double>(problem.weight_of(targets.b.y));
    loss += targets.b.share * ((1.0 - args.smoothing) * w * (largest - z_b + log_sum) + smooth);
  }
  return loss;
}

/* ---- the gradient of one row ---- */

/* dz_c = a softmax_c - s w_c - b_y [c = y]. */
struct Gradient {
  double a, s, b_a, b_b;
};

static Gradient gradient_of(const Problem& problem, const Targets& targets, double incoming) {
  const double kept = 1.0 - problem.args.smoothing;
  const auto pull = [&](const Target& t) {
    return t.counts ? incoming * t.share * kept * static_cast<double>(problem.weight_of(t.y)) : 0.0;
  };
  Gradient g;
  g.b_a = pull(targets.a);
  g.b_b = pull(targets.b);
  g.s = incoming * (targets.a.share + targets.b.share) * problem.smooth_each;
  g.a = g.b_a + g.b_b + g.s * problem.weight_sum;
  return g;
}

static double incoming_of(const fastmp_loss_args& args, int64_t row) {
  return args.grad_output == nullptr
             ? 1.0
             : static_cast<double>(args.grad_output[row * args.grad_stride]);
}

/* grad = e * factor - s * w. */
template <class T, bool weighted>
static void write_block(const float* e, const float* weight, T* __restrict grad, int64_t n,
                        float factor, float s) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    __builtin_prefetch(grad + i + n, 1);
    const Vec w = weighted ? load(weight + i) * s : broadcast(s);
    save(load(e + i) * factor - w, grad + i);
  }
  if (i < n) {
    const Vec w = weighted ? load_part(weight + i, n - i, 0.0f) * s : broadcast(s);
    save_part(load_part(e + i, n - i, 0.0f) * factor - w, grad + i, n - i);
  }
}

/* grad = exp(z - largest) * factor - s * w. */
template <class T, bool weighted>
static void rewrite_block(const T* z, const float* weight, T* __restrict grad, int64_t n,
                          float largest, float factor, float s) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec w = weighted ? load(weight + i) * s : broadcast(s);
    save(exp_nonpos(load(z + i) - largest) * factor - w, grad + i);
  }
  if (i < n) {
    const Vec w = weighted ? load_part(weight + i, n - i, 0.0f) * s : broadcast(s);
    const Vec e = exp_nonpos(load_part(z + i, n - i, largest) - largest);
    save_part(e * factor - w, grad + i, n - i);
  }
}

/* The targets' own elements again, in fp64: near softmax 1 they are a small difference. */
template <class T>
static void write_targets(const Problem& problem, const Targets& targets, const Gradient& g,
                          double softmax_a, double softmax_b, T* grad) {
  const bool same = targets.a.counts && targets.b.counts && targets.a.y == targets.b.y;
  const auto value = [&](const Target& t, double softmax, double b) {
    const double w = static_cast<double>(problem.weight_of(t.y));
    return static_cast<float>(g.a * softmax - g.s * w - b);
  };
  if (targets.a.counts) {
    store(value(targets.a, softmax_a, g.b_a + (same ? g.b_b : 0.0)), &grad[targets.a.y]);
  }
  if (targets.b.counts && !same) {
    store(value(targets.b, softmax_b, g.b_b), &grad[targets.b.y]);
  }
}

template <class T>
static void write_row(const Problem& problem, const Targets& targets, const Scan& scan,
                      const float* e, const float* references, double incoming, T* grad) {
  const fastmp_loss_args& args = problem.args;
  const Gradient g = gradient_of(problem, targets, incoming);
  const float s = static_cast<float>(g.s);
  const auto factor_of = [&](int64_t block) {
    const float below = references[block];
    const double rescale =
        below == scan.largest ? 1.0
                              : exp(static_cast<double>(below) - static_cast<double>(scan.largest));
    return rescale / scan.sum;
  };
  for (int64_t at = 0, block = 0; at < args.classes; at += kBlock, ++block) {
    const int64_t n = min_of(kBlock, args.classes - at);
    const float factor = static_cast<float>(g.a * factor_of(block));
    if (args.weight != nullptr) {
      write_block<T, true>(e + at, args.weight + at, grad + at, n, factor, s);
    } else {
      write_block<T, false>(e + at, nullptr, grad + at, n, factor, s);
    }
  }
  const auto softmax_at = [&](const Target& t) {
    return t.counts ? static_cast<double>(e[t.y]) * factor_of(t.y / kBlock) : 0.0;
  };
  write_targets(problem, targets, g, softmax_at(targets.a), softmax_at(targets.b), grad);
}

}  // namespace
}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
