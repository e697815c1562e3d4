/* loss: cross-entropy of a mixed pair of targets with smoothing. For a row z, targets a and b:
 *
 *   loss     = mix_weight_a CE(z, a) + mix_weight_b CE(z, b)
 *   CE(z, y) = (1-ε) w_y (lse(z) - z_y) + (ε/C) Σ_c w_c (lse(z) - z_c)
 *   grad_c   = softmax_coef softmax(z)_c - smooth_coef w_c - target_coef_a [c = a]
 *              - target_coef_b [c = b]
 *
 *   mix_weight_a  = λ / divisor_a,   mix_weight_b = (1-λ) / divisor_b
 *   divisor_y     = Σ w_y over the rows that are not ignored (reduction mean), else 1
 *   target_coef_y = grad_output mix_weight_y (1-ε) w_y
 *   smooth_coef   = grad_output (mix_weight_a + mix_weight_b) ε/C
 *   softmax_coef  = target_coef_a + target_coef_b + smooth_coef weight_total,   weight_total = Σ w
 *
 * Where softmax p_t of a target t is near 1, 1 - p_t and log p_t are small differences. The larger
 * of the two targets is therefore left out of the sum, others = Σ_{c != t} e_c, and
 *
 *   sum_exp  = others + e_t,   log sum_exp = log(1 + others) where e_t = 1
 *   grad_t   = ((target_coef_other + smooth_coef (weight_total - w_t)) e_t
 *              - (target_coef_t + smooth_coef w_t) others) / sum_exp
 *
 * which is grad_c of above with 1 - p_t = others / sum_exp (docs/numerics.md).
 *
 * Bytes per logit: the forward reads 4 (16-bit: 2) and, with the gradient, writes as many. A row is
 * taken in blocks that stay in L1: first the maximum, then exp(z - row_max so far) into fp32
 * scratch, one exp per logit, then their sum. When a later block raises row_max, earlier blocks get
 * a factor, applied with sum_exp when the gradient is written. The backward alone, for another
 * grad_output, reads and writes the same bytes again.
 *
 * A row is summed in fp32 lanes within a block and in fp64 across blocks, the rows in order in
 * fp64: no number of threads changes a bit. An ignored row is not read and its gradient is 0. */
#include "loss_row.h"
#include "pages.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

constexpr int64_t kGrain = 16384; /* logits worth a thread */
/* Logits that a row counts for beside its own. Measured are 256: 1,024 rows of 10 classes take 52
 * us, of 1,000 classes 250 (fp32, one thread, Zen 5, 2026-11-27). Half of it, so that a thread that
 * has to be woken has 6 us of work. */
constexpr int64_t kRowCost = 128;

int64_t rows_of_a_thread(int64_t classes) {
  return max_of<int64_t>(1, kGrain / (classes + kRowCost));
}

/* ---- forward over all rows ---- */

template <class T, Smooth smooth>
void forward_row(const Problem& problem, int64_t row, float* e, float* block_max) {
  const fastmp_loss_args& args = problem.args;
  const T* z = static_cast<const T*>(args.logits) + row * args.row_stride;
  T* grad = args.grad == nullptr ? nullptr : static_cast<T*>(args.grad) + row * args.classes;
  const Targets targets = targets_of(problem, row, z);
  if (!targets.larger.valid) {
    problem.row_losses[row] = 0.0;
    args.stats[2 * row] = 0.0f;
    args.stats[2 * row + 1] = 1.0f;
    if (grad != nullptr) memset(grad, 0, static_cast<size_t>(args.classes) * sizeof(T));
    return;
  }
  const int64_t e_stride = grad == nullptr ? 0 : kBlock;
  const RowSums sums = online_softmax<T, smooth>(z, args.weight, args.classes, targets.larger.y, e,
                                                 e_stride, block_max);
  problem.row_losses[row] = row_loss(problem, targets, sums, block_max);
  args.stats[2 * row] = sums.row_max;
  args.stats[2 * row + 1] = static_cast<float>(sums.others);
  if (grad != nullptr) {
    store_gradient(problem, targets, sums, e, block_max, grad_output_of(args, row), grad);
  }
}

template <class T, Smooth smooth>
int forward_rows(const Problem& problem) {
  const fastmp_loss_args& args = problem.args;
  const int64_t blocks = ceil_div(args.classes, kBlock);
  const int64_t kept = args.grad == nullptr ? min_of(kBlock, args.classes) : args.classes;
  int no_memory = 0;
  parallel_for(args.rows, rows_of_a_thread(args.classes), [&](int64_t begin, int64_t end) {
    Scratch<float> e(kept + kWidth), block_max(blocks);
    if (e.data == nullptr || block_max.data == nullptr) {
      __atomic_store_n(&no_memory, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      forward_row<T, smooth>(problem, row, e.data, block_max.data);
    }
  });
  return no_memory != 0 ? FASTMP_NO_MEMORY : FASTMP_OK;
}

template <class T>
int forward_as(const Problem& problem) {
  if (problem.smooth_prob == 0.0) return forward_rows<T, Smooth::none>(problem);
  if (problem.args.weight == nullptr) return forward_rows<T, Smooth::equal>(problem);
  return forward_rows<T, Smooth::weighted>(problem);
}

/* ---- backward over all rows ---- */

template <class T>
void backward_row(const Problem& problem, int64_t row) {
  const fastmp_loss_args& args = problem.args;
  const T* z = static_cast<const T*>(args.logits) + row * args.row_stride;
  T* grad = static_cast<T*>(args.grad) + row * args.classes;
  const Targets targets = targets_of(problem, row, z);
  if (!targets.larger.valid) {
    memset(grad, 0, static_cast<size_t>(args.classes) * sizeof(T));
    return;
  }
  const float row_max = args.stats[2 * row];
  const auto exp_of = [&](const Target& t) { return exp(t.z - static_cast<double>(row_max)); };
  const double others = static_cast<double>(args.stats[2 * row + 1]);
  const RowSums sums = {row_max, others, exp_of(targets.larger), 0.0};
  const GradientCoefs k = gradient_coefs(problem, targets, grad_output_of(args, row));
  const float factor = static_cast<float>(k.softmax_coef / sums.sum_exp());
  const float smooth_coef = static_cast<float>(k.smooth_coef);
  if (args.weight != nullptr) {
    gradient_of_logits<T, true>(z, args.weight, grad, args.classes, row_max, factor, smooth_coef);
  } else {
    gradient_of_logits<T, false>(z, nullptr, grad, args.classes, row_max, factor, smooth_coef);
  }
  const double exp_other = targets.other.valid ? exp_of(targets.other) : 0.0;
  fix_target_logits(problem, targets, k, sums, exp_other, grad);
}

template <class T>
int backward_as(const Problem& problem) {
  const fastmp_loss_args& args = problem.args;
  parallel_for(args.rows, rows_of_a_thread(args.classes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) backward_row<T>(problem, row);
  });
  return FASTMP_OK;
}

/* ---- the call ---- */

/* Whether no output overlaps the targets. */
bool outputs_disjoint(const fastmp_loss_args& args, const int64_t* targets) {
  const int64_t bytes = args.rows * 8, losses = args.reduction == FASTMP_NONE ? args.rows : 1;
  return disjoint(targets, bytes, args.loss, losses * 4) &&
         disjoint(targets, bytes, args.stats, args.rows * 8) &&
         disjoint(targets, bytes, args.grad, args.rows * args.classes * bytes_of(args.dtype));
}

bool is_valid(const fastmp_loss_args& args) {
  if (!is_float(args.dtype)) return false;
  if (args.reduction < FASTMP_NONE || args.reduction > FASTMP_SUM) return false;
  if (!is_addressable(8, args.rows, args.classes)) return false;
  if (!is_addressable(8, args.rows, args.row_stride)) return false;
  if (!is_addressable(8, args.rows) || !is_addressable(8, args.classes)) return false;
  if (!is_aligned(bytes_of(args.dtype), args.logits, args.grad)) return false;
  if (!is_aligned(8, args.target_a, args.target_b)) return false;
  if (args.lam_stride < 0 || args.lam_stride > 1) return false;
  if (args.grad_output_stride < 0 || args.grad_output_stride > 1) return false;
  if (!is_aligned(4, args.lam, args.weight, args.grad_output, args.loss, args.stats)) return false;
  if (args.rows == 0) return true;
  if (args.target_a == nullptr || args.stats == nullptr) return false;
  if (!outputs_disjoint(args, args.target_a)) return false;
  if (!outputs_disjoint(args, args.target_b)) return false;
  if (args.target_b != nullptr && args.lam == nullptr) return false;
  return args.classes == 0 || args.logits != nullptr;
}

/* Whether grad_output and grad are there. */
bool has_gradients(const fastmp_loss_args& args) {
  if (args.rows == 0 || args.classes == 0) return true;
  return args.grad != nullptr && args.grad_output != nullptr;
}

/* False: a target is out of range, see bad_row. divisor: Σ w_y of those that are not ignored. */
bool check_targets(fastmp_loss_args& args, const int64_t* targets, double* divisor) {
  double sum = 0.0;
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t y = targets[row];
    if (y == args.ignore_index) continue;
    if (y < 0 || y >= args.classes) {
      args.bad_row = row;
      args.bad_target = y;
      return false;
    }
    sum += args.weight == nullptr ? 1.0 : static_cast<double>(args.weight[y]);
  }
  *divisor = sum;
  return true;
}

/* Σ w over each block, and over all. */
double sum_weights(const fastmp_loss_args& args, double* block_weights) {
  double all = 0.0;
  for (int64_t at = 0, block = 0; at < args.classes; at += kBlock, ++block) {
    const int64_t n = min_of(kBlock, args.classes - at);
    double sum = static_cast<double>(n);
    if (args.weight != nullptr) {
      sum = 0.0;
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(args.weight[at + i]);
    }
    block_weights[block] = sum;
    all += sum;
  }
  return all;
}

int run(fastmp_loss_args& args, double* row_losses, int (*rows)(const Problem&), double* divisors) {
  Scratch<double> block_weights(args.classes / kBlock + 1);
  if (block_weights.data == nullptr) return FASTMP_NO_MEMORY;
  divisors[0] = divisors[1] = 1.0;
  if (!check_targets(args, args.target_a, &divisors[0])) return FASTMP_BAD_TARGET;
  if (args.target_b != nullptr && !check_targets(args, args.target_b, &divisors[1])) {
    return FASTMP_BAD_TARGET;
  }
  if (args.classes == 0 || args.rows == 0) return FASTMP_OK;
  if (args.grad != nullptr) {
    hint_huge_pages(args.grad, args.rows * args.classes * bytes_of(args.dtype));
  }
  const bool mean = args.reduction == FASTMP_MEAN;
  const Problem problem = {args,
                           mean ? 1.0 / divisors[0] : 1.0,
                           mean ? 1.0 / divisors[1] : 1.0,
                           1.0 - args.smoothing,
                           args.smoothing / static_cast<double>(args.classes),
                           sum_weights(args, block_weights.data),
                           block_weights.data,
                           row_losses};
  return rows(problem);
}

}  // namespace

int loss_forward(fastmp_loss_args* args) {
  if (!is_valid(*args)) return FASTMP_BAD_ARGUMENT;
  const bool none = args->reduction == FASTMP_NONE && args->rows == 0;
  if (args->loss == nullptr && !none) return FASTMP_BAD_ARGUMENT;
  Scratch<double> row_losses(args->rows);
  if (row_losses.data == nullptr) return FASTMP_NO_MEMORY;
  if (args->classes == 0) { /* every row is ignored, or there is none */
    for (int64_t row = 0; row < args->rows; ++row) {
      row_losses.data[row] = 0.0;
      args->stats[2 * row] = args->stats[2 * row + 1] = 0.0f;
    }
  }
  int (*const rows[])(const Problem&) = {forward_as<float>, forward_as<f16>, forward_as<bf16>};
  double divisors[2];
  const int status = run(*args, row_losses.data, rows[args->dtype], divisors);
  if (status != FASTMP_OK) return status;
  if (args->reduction == FASTMP_NONE) {
    for (int64_t row = 0; row < args->rows; ++row) {
      args->loss[row] = static_cast<float>(row_losses.data[row]);
    }
    return FASTMP_OK;
  }
  double loss = 0.0;
  for (int64_t row = 0; row < args->rows; ++row) loss += row_losses.data[row];
  const bool all_ignored = divisors[0] == 0.0 || divisors[1] == 0.0;
  if (args->reduction == FASTMP_MEAN && all_ignored) loss = static_cast<double>(__builtin_nanf(""));
  *args->loss = static_cast<float>(loss);
  return FASTMP_OK;
}

int loss_backward(fastmp_loss_args* args) {
  if (!is_valid(*args) || !has_gradients(*args)) return FASTMP_BAD_ARGUMENT;
  int (*const rows[])(const Problem&) = {backward_as<float>, backward_as<f16>, backward_as<bf16>};
  double divisors[2];
  return run(*args, nullptr, rows[args->dtype], divisors);
}

}  // namespace FASTMP_TARGET
}  // namespace fastmp
