/* Rows of the loss: which part of a row a block has, and what it is multiplied with. The producer
 * knows it a row ahead, and leaves it in shared memory: hundreds of consumers do not compute it. */
#ifndef FASTMP_LOSS_PLAN_H
#define FASTMP_LOSS_PLAN_H

#include "../common/loss.h"
#include "async.h"

namespace fastmp {

/* What the kernel is compiled for. */
enum class Smooth { none, equal, weighted };

/* aligned: the gradient has its 16-byte boundaries where the logits have theirs. each: vectors of a
 * chunk that belong to a thread. */
template <class T_, Smooth smooth_, bool aligned_, int threads_, int cluster_, int each_>
struct Config {
  typedef T_ T;
  static constexpr Smooth smooth = smooth_;
  static constexpr bool aligned = aligned_;
  static constexpr int threads = threads_; /* consumers */
  static constexpr int cluster = cluster_;
  static constexpr int warps = threads_ / kWarp;
  static constexpr int vector = 16 / sizeof(T_); /* logits in 16 bytes */
  static constexpr int each = each_;
  static constexpr int chunk_vectors = threads_ * each_;
  static constexpr int chunk_logits = chunk_vectors * vector;
  static constexpr int chunk = 16 * chunk_vectors; /* bytes */
  static_assert(warps <= kWarp, "the sums of all warps are one warp's");
  static_assert(threads_ >= 2 * vector, "a thread for each edge logit");
};

/* The part of a row that belongs to this block, in classes. */
template <class T>
struct Slice {
  const T* logits;  /* of the whole row */
  int32_t prologue; /* classes before the first vector of the row */
  int32_t first;    /* class of the block's first vector */
  int32_t vectors;  /* of the block */
  int32_t split;    /* first class of the second block */
  int32_t tail;     /* class after the last vector of the row */
};

template <class K>
FASTMP_DEVICE Slice<typename K::T> slice_of(const fastmp_ring_args& args, int32_t row,
                                            int32_t rank) {
  typedef typename K::T T;
  constexpr int32_t n = K::vector;
  const T* logits = static_cast<const T*>(args.logits) + row * args.row_stride;
  const int32_t past = static_cast<int32_t>(reinterpret_cast<uintptr_t>(logits) / sizeof(T) %
                                            static_cast<uint32_t>(n));
  const int32_t prologue = min_of((n - past) % n, args.classes);
  const int32_t total = (args.classes - prologue) / n;
  const int32_t each = (total + K::cluster - 1) / K::cluster;
  const int32_t begin = rank * each;
  const int32_t vectors = min_of(each, total - begin);
  return {
      logits, prologue, prologue + begin * n, vectors, prologue + each * n, prologue + total * n};
}

/* The class of this thread's edge logit; -1: it has none. */
template <class K>
FASTMP_DEVICE int32_t edge_class(const Slice<typename K::T>& slice, int32_t classes, int32_t rank) {
  constexpr int32_t n = K::vector;
  const int32_t left = thread(), right = slice.tail + thread() - n;
  if (left < n) return rank == 0 && left < slice.prologue ? left : -1;
  return left < 2 * n && rank == K::cluster - 1 && right < classes ? right : -1;
}

constexpr int32_t kIgnored = -1;
constexpr int32_t kOutOfRange = -2;

/* Two classes; without a second target it is ignored. */
struct Targets {
  int32_t a, b;

  __device__ __forceinline__ bool are_ignored() const { return a == kIgnored && b == kIgnored; }
};

FASTMP_DEVICE int32_t class_of(const fastmp_ring_args& args, int64_t target) {
  if (target == args.ignore_index) return kIgnored;
  return target < 0 || target >= args.classes ? kOutOfRange : static_cast<int32_t>(target);
}

/* Row `turn` from the end: the matrix product before has just written the last ones. */
FASTMP_DEVICE int32_t row_at(const fastmp_ring_args& args, int32_t turn) {
  return args.rows - 1 - turn;
}

/* As they stand in memory. */
struct TargetPair {
  int64_t a, b;
};

FASTMP_DEVICE TargetPair targets_of(const fastmp_ring_args& args, int32_t row) {
  return {read_only(args.target_a + row),
          args.target_b == nullptr ? args.ignore_index : read_only(args.target_b + row)};
}

/* Past the last row: ignored. */
FASTMP_DEVICE TargetPair read_targets(const fastmp_ring_args& args, int32_t turn) {
  if (turn < args.rows) return targets_of(args, row_at(args, turn));
  return {args.ignore_index, args.ignore_index};
}

FASTMP_DEVICE Targets classes_of(const fastmp_ring_args& args, const TargetPair& pair) {
  return {class_of(args, pair.a), class_of(args, pair.b)};
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
  const float lam =
      args.lam == nullptr ? args.lam_value : read_only(args.lam + row * args.lam_stride);
  const float mix_b = (1.0f - lam) * constants.inv_divisor_b;
  return {lam * constants.inv_divisor_a, args.target_b == nullptr ? 0.0f : mix_b,
          class_weight(args.weight, targets.a), class_weight(args.weight, targets.b)};
}

/* In every lane. */
FASTMP_DEVICE float sum_over_lanes(float sum) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

/* Of targets a and b; of a twice without a second one. */
struct Divisors {
  float a, b;
};

/* By all lanes of a warp, from partials of another launch. */
FASTMP_DEVICE float sum_of_partials(const float* partials) {
  float sum = 0.0f;
  for (int32_t i = thread() % kWarp; i < kDivisorParts; i += kWarp) sum += partials[i];
  return sum_over_lanes(sum);
}

FASTMP_DEVICE Divisors load_divisors(const fastmp_ring_args& args) {
  const float* partials = args.divisor_partials;
  if (partials == nullptr) return {1.0f, 1.0f};
  const float a = sum_of_partials(partials);
  return {a, args.target_b == nullptr ? a : sum_of_partials(partials + kDivisorParts)};
}

/* For the backward: the last row of the statistics. */
FASTMP_DEVICE void store_divisors(const fastmp_ring_args& args, const Divisors& divisors) {
  float* to = args.stats + 2 * static_cast<int64_t>(args.rows);
  to[0] = divisors.a;
  to[1] = divisors.b;
}

FASTMP_DEVICE Constants constants_of(const fastmp_ring_args& args, const Divisors& divisors) {
  return {reciprocal(divisors.a), reciprocal(divisors.b),
          args.grad_output == nullptr ? args.grad_output_value : read_only(args.grad_output),
          args.weight == nullptr ? static_cast<float>(args.classes) : read_only(args.weight_total)};
}

/* Of the gradient of a row: common/loss.h. */
struct RowCoefs {
  float softmax, smooth;
  TargetCoefs<float> a, b;
};

FASTMP_DEVICE RowCoefs row_coefs(const fastmp_ring_args& args, const Constants& constants,
                                 const Targets& targets, const RowWeights& w) {
  const float g = constants.grad_output, total = constants.weight_total;
  const LossCoefs<float> k = loss_coefs(targets.a == kIgnored ? 0.0f : g * w.mix_a,
                                        targets.b == kIgnored ? 0.0f : g * w.mix_b, w.w_a, w.w_b,
                                        args.target_prob, args.smooth_prob, total);
  const bool same = targets.a == targets.b;
  const float coef_a = same ? k.target_coef_a + k.target_coef_b : k.target_coef_a;
  const float other = same ? 0.0f : k.target_coef_b;
  return {k.softmax_coef, k.smooth_coef, target_coefs(coef_a, other, k.smooth_coef, w.w_a, total),
          target_coefs(k.target_coef_b, k.target_coef_a, k.smooth_coef, w.w_b, total)};
}

constexpr int32_t kNoRow = -1; /* of the plan after the last row */

/* Lies beside the first chunk of its row, and is guarded by the chunk's barriers. */
template <class T>
struct alignas(16) Plan {
  Slice<T> slice;
  T* grad; /* of the whole row */
  int32_t row;
  Targets targets;
  RowWeights weights;
  RowCoefs coefs;
};
constexpr int kPlanBytes = 112;
static_assert(sizeof(Plan<float>) <= kPlanBytes, "backends/cuda/loss.py leaves so much");

template <class K>
FASTMP_DEVICE Plan<typename K::T> plan_row(const fastmp_ring_args& args, const Constants& constants,
                                           const Targets& targets, int32_t row, int32_t rank) {
  typedef typename K::T T;
  const RowWeights w = load_row_weights(args, constants, targets, row);
  return {slice_of<K>(args, row, rank),
          static_cast<T*>(args.grad) + static_cast<int64_t>(row) * args.classes,
          row,
          targets,
          w,
          row_coefs(args, constants, targets, w)};
}

}  // namespace fastmp
#endif
