/* A few rows through csrc/cuda/loss.cu under ThreadSanitizer. The argument names a barrier to take
 * out; the sanitizer then has to find the race, and without an argument none. */
#include <cstdio>

#include "shim.h"

using namespace fastmp;

constexpr int32_t kRows = 12, kClasses = 403; /* 2 chunks of a block, or of each half */

template <int cluster>
static void run(int32_t slots) {
  std::vector<bf16> logits(kRows * kClasses), grad(logits.size());
  std::vector<int64_t> a(kRows), b(kRows);
  std::vector<float> loss(kRows), stats(2 * kRows + 2), partials(2 * kDivisorParts);
  float total;
  int32_t taken;
  for (size_t i = 0; i < logits.size(); ++i) {
    store(static_cast<float>(i * 37 % 101) / 10.0f, &logits[i]);
  }
  for (int32_t row = 0; row < kRows; ++row) {
    a[static_cast<size_t>(row)] = row * 31 % kClasses;
    b[static_cast<size_t>(row)] = row % 5 == 4 ? -100 : row * 67 % kClasses;
  }
  a[4] = -100; /* with b: a row that is skipped */
  fastmp_ring_args args = {};
  args.logits = logits.data();
  args.row_stride = args.classes = kClasses;
  args.rows = kRows;
  args.target_a = a.data();
  args.target_b = b.data();
  args.lam_value = 0.25f;
  args.divisor_partials = partials.data();
  args.loss = loss.data();
  args.total = &total;
  args.taken = &taken;
  args.stats = stats.data();
  args.grad = grad.data();
  args.ignore_index = -100;
  args.target_prob = 0.9f;
  args.smooth_prob = 0.1f / kClasses;
  args.slots = slots;
  const size_t bytes = static_cast<size_t>(slots) * (32 * kConsumers + 128);
  std::atomic<bool> has_divisors{false}; /* the launch of the rows begins before that */
  std::thread rows([&] {
    const LossKernel kernel = loss_kernel<bf16, Smooth::equal, true, cluster>();
    launch(kernel, cluster, cluster, &args, bytes, &has_divisors);
  });
  launch(loss_divisors<kDivisorParts>, kDivisorParts, 1, &args, bytes);
  has_divisors = true;
  has_divisors.notify_all();
  rows.join();
  launch(loss_sum<kThreads>, 1, 1, &args, bytes);
}

int main(int count, char** arguments) {
  const char* names[] = {"none", "full", "empty", "block", "warp", "cluster", "launch"};
  for (int i = 0; count > 1 && i < 7; ++i) {
    if (std::strcmp(arguments[1], names[i]) == 0) missing = static_cast<Missing>(i);
  }
  for (int32_t spare = 0; spare < 3; ++spare) {
    run<1>(2 + spare);
    run<2>(2 + spare);
  }
  std::fputs("done", stderr);
  std::_Exit(0); /* the threads of the grids still wait */
}
