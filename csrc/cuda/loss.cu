/* loss: cross-entropy of a mixed pair of targets with smoothing, and its gradient, for rows that do
 * not fit into registers: each stays in shared memory between its two uses. For a row z, with
 * row_max = max z, e = exp(z - row_max) and sum_exp = Σ e:
 *
 *   loss   = Σ_{y in a, b} mix_weight_y ( (1-ε) w_y (log sum_exp - (z_y - row_max))
 *                                         + ε/C (Σw log sum_exp + Σ_c w_c (row_max - z_c)) )
 *   grad_c = softmax_coef e_c / sum_exp - smooth_coef w_c, at the targets as in common/loss.h
 *
 *   mix_weight_a = λ / divisor_a,   mix_weight_b = (1-λ) / divisor_b
 *   divisor_y    = Σ w_y over the rows that are not ignored (reduction mean), else 1
 *
 * Bytes: 2 read and 2 written for each 16-bit logit, about 40 for each row; rows whose targets are
 * ignored are not read. A kernel that reads the row twice from memory moves 6 instead of 4.
 *
 * A row goes through the ring of loss_ring.h. As its chunks arrive each thread takes its 16 bytes
 * of them into a running maximum and sum; the block meets once, with a cluster of two once more;
 * the chunks are read a second time, from shared memory, and the gradient is written. Meanwhile the
 * producer fills the chunks that are given back. Rows that no multiprocessor holds are halved
 * between two blocks of a cluster.
 *
 * Cycles, for 8,192 x 32,000 in bf16 on an H200: at 84% of a copy a multiprocessor has 8,300 for a
 * row. Two exponentials a logit are 4,250 of them on its 16 special-function lanes; 12 and 10
 * instructions a logit (SASS, with smoothing), which 128 lanes issue, are 5,600, and overlap with
 * those. backends/cuda/loss.py has the sizes, and what was measured of them. z - row_max is a
 * subtraction of its own: as z log2(e) - row_max log2(e), one instruction less, it would be wrong
 * by the rounding of the second product, 2^64 at -1e9 in all places.
 *
 * Every sum has one order: 16 bytes, chunks, lanes, warps, halves. */
#include "../common/loss.h"
#include "loss_ring.h"

namespace fastmp {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLowest = -3.402823466e38f; /* finite: -inf - kLowest is -inf, and not NaN */

/* ---- sums over a row ---- */

/* Over the logits seen so far (Milakov & Gimelshein 2018). */
struct Sums {
  float max;    /* targets included */
  float others; /* Σ exp(z - max), without the targets */
  float below;  /* Σ w (z - max): no term is positive, and nothing cancels */
  float count;  /* Σ w */
};

constexpr Sums kNothing = {kLowest, 0.0f, 0.0f, 0.0f};

/* Relative to a larger maximum. */
FASTMP_DEVICE void raise(Sums& sums, float max) {
  const float change = sums.max - max;
  sums.others *= exp2_fast(change * kLog2E);
  if (sums.count > 0.0f) sums.below += sums.count * change;
  sums.max = max;
}

/* The sums over the 32 lanes, in every lane. */
template <class K>
FASTMP_DEVICE Sums sum_over_warp(Sums sums) {
  float max = sums.max;
  for (int mask = kWarp / 2; mask > 0; mask /= 2) max = larger(max, shuffle_xor(max, mask));
  raise(sums, max);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    sums.others += shuffle_xor(sums.others, mask);
    if constexpr (K::smooth != Smooth::none) {
      sums.below += shuffle_xor(sums.below, mask);
      sums.count += shuffle_xor(sums.count, mask);
    }
  }
  return sums;
}

/* The sums over a row, or half of it, with the logits of its targets. */
struct Totals {
  Sums sums;
  float z_a, z_b;
};

/* Shared memory beside the ring. Rows take its two parts in turn: a warp that is one row ahead
 * writes where no other reads. */
struct Shared {
  Sums warps[2][kWarp];
  float target_logits[2][2];
  Totals halves[2][2];
  Barrier exchange[2];
};
static_assert(sizeof(Shared) <= 1280, "backends/cuda/loss.py leaves so much beside the ring");

/* Exchanges the totals with the other block of the cluster. */
FASTMP_DEVICE Totals sum_over_cluster(const Totals& mine, const Targets& targets, int32_t split,
                                      int32_t rank, int32_t count, Shared& shared) {
  Totals* halves = shared.halves[count & 1];
  const SharedAddress barrier = shared_address(&shared.exchange[count & 1]);
  if (thread() < 2) {
    const float values[] = {mine.sums.max,   mine.sums.others, mine.sums.below,
                            mine.sums.count, mine.z_a,         mine.z_b};
    const SharedAddress to = shared_address(&halves[rank]);
    for (int32_t i = 0; i < 6; ++i) store_in_rank(to + i * sizeof(float), values[i], thread());
    arrive_in_rank(barrier, thread());
  }
  wait_for_cluster(barrier, static_cast<uint32_t>(count / 2) & 1u);
  Totals first = halves[0], second = halves[1];
  const float max = larger(first.sums.max, second.sums.max);
  raise(first.sums, max);
  raise(second.sums, max);
  return {{max, first.sums.others + second.sums.others, first.sums.below + second.sums.below,
           first.sums.count + second.sums.count},
          targets.a < split ? first.z_a : second.z_a,
          targets.b < split ? first.z_b : second.z_b};
}

/* ---- 16 bytes of logits ---- */

typedef Access<16>::Bits Bits;

union Vector {
  Bits bits;
  uint32_t words[4];
};

template <class K>
FASTMP_DEVICE void unpack_vector(const Vector& v, float (&values)[K::vector]) {
  for (int i = 0; i < 4; ++i) {
    if constexpr (K::vector == 4) {
      values[i] = float_from_bits(v.words[i]);
    } else {
      unpack(v.words[i], values[2 * i], values[2 * i + 1], typename K::T());
    }
  }
}

template <class K>
FASTMP_DEVICE Bits pack_vector(const float (&values)[K::vector]) {
  Vector v;
  for (int i = 0; i < 4; ++i) {
    if constexpr (K::vector == 4) {
      v.words[i] = bits_of(values[i]);
    } else {
      v.words[i] = pack(values[2 * i], values[2 * i + 1], typename K::T());
    }
  }
  return v.bits;
}

/* The largest of the values of v, which z has in fp32. */
template <class K>
FASTMP_DEVICE float max_of(const Vector& v, const float (&z)[K::vector]) {
  if constexpr (K::vector == 4) {
    return larger(larger(z[0], z[1]), larger(z[2], z[3]));
  } else {
    typedef typename K::T T;
    float low, high;
    unpack(larger_pair(larger_pair(v.words[0], v.words[1], T()),
                       larger_pair(v.words[2], v.words[3], T()), T()),
           low, high, T());
    return larger(low, high);
  }
}

template <int n>
FASTMP_DEVICE float sum_of(const float (&values)[n]) {
  if constexpr (n == 1) return values[0];
  float pairs[(n + 1) / 2];
  for (int i = 0; i < n / 2; ++i) pairs[i] = values[i] + values[i + n / 2];
  if constexpr (n > 1) return sum_of(pairs);
}

/* Σ w (z - max) of n classes from `at` on; counts their weights. */
template <class K, int n>
FASTMP_DEVICE float weighted_sum(Sums& sums, const float (&below)[n], int32_t at,
                                 const float* weight) {
  if constexpr (K::smooth == Smooth::equal) {
    sums.count += static_cast<float>(n);
    return sum_of(below);
  }
  float terms[n];
  for (int i = 0; i < n; ++i) {
    const float w = read_only(weight + at + i);
    sums.count += w;
    terms[i] = w * below[i];
  }
  return sum_of(terms);
}

template <int n>
FASTMP_DEVICE bool is_among(int32_t y, int32_t at) {
  return static_cast<uint32_t>(y - at) < static_cast<uint32_t>(n);
}

/* Adds the logits of n classes from `at` on, of which the largest is max; keeps those of targets.
 */
template <class K, int n>
FASTMP_DEVICE void add(Sums& sums, float (&z)[n], float max, int32_t at, const float* weight,
                       const Targets& targets, float* target_logits) {
  if (max > sums.max) raise(sums, max);
  const bool has_target = is_among<n>(targets.a, at) || is_among<n>(targets.b, at);
  if (has_target) {
    for (int i = 0; i < n; ++i) {
      if (targets.a == at + i) target_logits[0] = z[i];
      if (targets.b == at + i) target_logits[1] = z[i];
    }
  }
  for (int i = 0; i < n; ++i) z[i] -= sums.max;
  if constexpr (K::smooth != Smooth::none) sums.below += weighted_sum<K>(sums, z, at, weight);
  for (int i = 0; i < n; ++i) z[i] = exp2_fast(z[i] * kLog2E);
  if (has_target) {
    for (int i = 0; i < n; ++i) {
      if (targets.a == at + i || targets.b == at + i) z[i] = 0.0f;
    }
  }
  sums.others += sum_of(z);
}

/* ---- the gradient ---- */

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

/* The sum of the exponentials without the larger target, and of all. */
struct RowSum {
  float others, all;
  bool target_is_max;
};

/* log Σ exp(z - max): x log(u) / (u - 1) is log(1 + x), whatever rounding makes of u = 1 + x
 * (W. Kahan). */
FASTMP_DEVICE float log_sum_exp_of(const RowSum& sum) {
  const float log_all = log_of(sum.all);
  if (!sum.target_is_max || sum.all >= 2.0f) return log_all;
  return sum.all == 1.0f ? sum.others : sum.others * (log_all / (sum.all - 1.0f));
}

/* Loss and statistics of a row, by one thread. */
FASTMP_DEVICE void store_loss(const fastmp_ring_args& args, const Constants& constants,
                              const Totals& row, const RowSum& sum, const Targets& targets,
                              const RowWeights& w, int32_t index) {
  const float log_sum_exp = log_sum_exp_of(sum);
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
  args.stats[2 * index + 1] = sum.others;
}

/* Ends the sums of a row, stores its loss, and begins its gradient. */
FASTMP_DEVICE Gradient finish_row(const fastmp_ring_args& args, const Constants& constants,
                                  const Totals& row, Targets targets, const RowWeights& w,
                                  int32_t index, bool stores_loss) {
  const bool same = targets.a == targets.b;
  const auto exp_of = [&](int32_t y, float z) {
    return y < 0 ? 0.0f : exp2_fast((z - row.sums.max) * kLog2E);
  };
  const float exp_a = exp_of(targets.a, row.z_a);
  const float exp_b = same ? 0.0f : exp_of(targets.b, row.z_b);
  const float sum_exp = row.sums.others + exp_a + exp_b;
  if (stores_loss) {
    const bool b_is_larger = targets.b >= 0 && (targets.a < 0 || row.z_b > row.z_a);
    const float largest = b_is_larger ? row.z_b : row.z_a;
    const RowSum sum = {row.sums.others + (b_is_larger ? exp_a : exp_b), sum_exp,
                        targets.a >= 0 || targets.b >= 0 ? largest == row.sums.max : false};
    store_loss(args, constants, row, sum, targets, w, index);
  }
  const float g = constants.grad_output;
  const LossCoefs<float> k = loss_coefs(targets.a == kIgnored ? 0.0f : g * w.mix_a,
                                        targets.b == kIgnored ? 0.0f : g * w.mix_b, w.w_a, w.w_b,
                                        args.target_prob, args.smooth_prob, constants.weight_total);
  const float inv_sum_exp = reciprocal(sum_exp);
  const float coef_a = k.target_coef_a + (same ? k.target_coef_b : 0.0f);
  const float at_a = target_gradient(k, coef_a, w.w_a, exp_a, row.sums.others + exp_b, inv_sum_exp);
  const float at_b =
      target_gradient(k, k.target_coef_b, w.w_b, exp_b, row.sums.others + exp_a, inv_sum_exp);
  return {row.sums.max,      k.softmax_coef * inv_sum_exp, k.smooth_coef, targets, at_a,
          same ? at_a : at_b};
}

/* ---- a row, by the consumers ---- */

template <class K>
struct Consumer {
  typedef typename K::T T;
  static constexpr int n = K::vector;

  const fastmp_ring_args& args;
  const Ring<K>& ring;
  Shared& shared;
  Constants constants;
  int32_t rank;
  Cursor at;     /* of the next row's first chunk */
  int32_t count; /* rows so far */

  /* This thread's 16 bytes of a chunk. */
  __device__ __forceinline__ Vector read_vector(const Cursor& chunk) const {
    Vector v;
    v.bits = load_shared(ring.chunk(chunk) + 16 * thread(), Bits());
    return v;
  }

  __device__ __forceinline__ Sums sum_chunks(const Slice<T>& slice, const Targets& targets,
                                             float* target_logits) const {
    Sums sums = kNothing;
    Cursor chunk = at;
    int32_t y = slice.first + thread() * n; /* class of this thread's first logit */
    const int32_t end = slice.first + slice.vectors * n;
#pragma unroll 1
    for (int32_t begin = slice.first; begin < end; begin += K::threads * n) {
      wait(ring.full(chunk.slot), chunk.parity);
      if (y < end) {
        const Vector v = read_vector(chunk);
        float z[n];
        unpack_vector<K>(v, z);
        add<K>(sums, z, max_of<K>(v, z), y, args.weight, targets, target_logits);
      }
      y += K::threads * n;
      chunk.advance(ring.slots);
    }
    return sums;
  }

  __device__ __forceinline__ Totals sum_over_block(Sums sums) const {
    Sums* warps = shared.warps[count & 1];
    sums = sum_over_warp<K>(sums);
    if (thread() % kWarp == 0) warps[thread() / kWarp] = sums;
    sync_first_threads<K::threads>();
    const int32_t lane = thread() % kWarp;
    const float* z = shared.target_logits[count & 1];
    return {sum_over_warp<K>(lane < K::warps ? warps[lane] : kNothing), z[0], z[1]};
  }

  /* All lanes of the warp have read the chunk for the last time. */
  __device__ __forceinline__ void give_back(const Cursor& chunk) const {
    sync_warp();
    if (thread() % kWarp == 0) arrive(ring.empty(chunk.slot));
  }

  __device__ __forceinline__ void write_vectors(const Slice<T>& slice, const Gradient& g, T* grad) {
    int32_t y = slice.first + thread() * n;
    const int32_t end = slice.first + slice.vectors * n;
    T* to = grad + y;
#pragma unroll 1
    for (int32_t begin = slice.first; begin < end; begin += K::threads * n) {
      Vector v;
      if (y < end) v = read_vector(at);
      give_back(at);
      at.advance(ring.slots);
      if (y < end) {
        float z[n];
        unpack_vector<K>(v, z);
        gradients_at<K>(g, z, y, args.weight);
        store_streaming(pack_vector<K>(z), reinterpret_cast<Bits*>(to));
      }
      y += K::threads * n;
      to += K::threads * n;
    }
  }

  /* The gradient starts elsewhere within 16 bytes: neighbouring threads take neighbouring logits,
   * 64 bytes a warp and store. */
  __device__ __forceinline__ void write_elements(const Slice<T>& slice, const Gradient& g,
                                                 T* grad) {
    const int32_t end = slice.first + slice.vectors * n;
#pragma unroll 1
    for (int32_t begin = slice.first; begin < end; begin += K::threads * n) {
      const int32_t y = begin + thread();
      const SharedAddress from = ring.chunk(at) + thread() * sizeof(T);
      T items[n];
      for (int e = 0; e < n; ++e) {
        if (y + e * K::threads < end) {
          items[e] = load_shared(from + e * K::threads * sizeof(T), T());
        }
      }
      give_back(at);
      at.advance(ring.slots);
      for (int e = 0; e < n; ++e) {
        const int32_t own = y + e * K::threads;
        if (own < end) write_element(g, to_float(items[e]), own, grad);
      }
    }
  }

  __device__ __forceinline__ void write_element(const Gradient& g, float value, int32_t y,
                                                T* grad) const {
    float z[1] = {value};
    gradients_at<K>(g, z, y, args.weight);
    store(z[0], grad + y);
  }

  /* Returns the targets of the turn after it. */
  __device__ __forceinline__ Targets take_row(int32_t row, const Targets& targets,
                                              int32_t next_turn) {
    const Slice<T> slice = slice_of<K>(args, row, rank);
    const int32_t edge = edge_class<K>(slice, args.classes, rank);
    const float edge_logit = edge >= 0 ? to_float(slice.logits[edge]) : 0.0f;
    float* target_logits = shared.target_logits[count & 1];
    Sums sums = sum_chunks(slice, targets, target_logits);
    if (edge >= 0) {
      float z[1] = {edge_logit};
      add<K>(sums, z, edge_logit, edge, args.weight, targets, target_logits);
    }
    const RowWeights weights = load_row_weights(args, constants, targets, row);
    const TargetPair next = read_targets(args, next_turn); /* both while the block adds up */
    Totals totals = sum_over_block(sums);
    if constexpr (K::cluster > 1) {
      totals = sum_over_cluster(totals, targets, slice.split, rank, count, shared);
    }
    ++count;
    const Gradient g =
        finish_row(args, constants, totals, targets, weights, row, thread() == 0 && rank == 0);
    T* grad = static_cast<T*>(args.grad) + static_cast<int64_t>(row) * args.classes;
    if constexpr (K::aligned) {
      write_vectors(slice, g, grad);
    } else {
      write_elements(slice, g, grad);
    }
    if (edge >= 0) write_element(g, edge_logit, edge, grad);
    return classes_of(args, next);
  }

  /* Loss and gradient 0; the loss is NaN where a divisor is 0, as torch's. */
  __device__ __forceinline__ void take_ignored_row(int32_t row, const Targets& targets) const {
    const Slice<T> slice = slice_of<K>(args, row, rank);
    const int32_t edge = edge_class<K>(slice, args.classes, rank);
    T* grad = static_cast<T*>(args.grad) + static_cast<int64_t>(row) * args.classes;
    T* to = grad + slice.first;
    if constexpr (K::aligned) {
      const float zeros[n] = {};
#pragma unroll 1
      for (int32_t i = thread(); i < slice.vectors; i += K::threads) {
        store_streaming(pack_vector<K>(zeros), reinterpret_cast<Bits*>(to) + i);
      }
    } else {
#pragma unroll 1
      for (int32_t i = thread(); i < slice.vectors * n; i += K::threads) store(0.0f, to + i);
    }
    if (edge >= 0) store(0.0f, grad + edge);
    if (thread() == 0 && rank == 0) {
      const RowWeights w = load_row_weights(args, constants, targets, row);
      store_loss(args, constants, {kNothing, 0.0f, 0.0f}, {0.0f, 1.0f, false}, targets, w, row);
    }
  }
};

/* ---- kernels ---- */

/* The sum of the partials, in one order, in every lane. */
FASTMP_DEVICE float inv_divisor(const float* partials) {
  float sum = 0.0f;
  for (int32_t i = thread() % kWarp; i < kDivisorParts; i += kWarp) sum += read_only(partials + i);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return reciprocal(sum);
}

FASTMP_DEVICE Constants load_constants(const fastmp_ring_args& args) {
  const float* partials = args.divisor_partials;
  const bool pair = args.target_b != nullptr;
  return {partials == nullptr ? 1.0f : inv_divisor(partials),
          partials == nullptr || !pair ? 1.0f : inv_divisor(partials + kDivisorParts),
          args.grad_output == nullptr ? 1.0f : read_only(args.grad_output),
          args.weight == nullptr ? static_cast<float>(args.classes) : read_only(args.weight_total)};
}

/* K::threads consumers and one warp of which a thread is the producer. */
template <class K>
FASTMP_DEVICE void take_rows(const fastmp_ring_args& args) {
  FASTMP_DYNAMIC_SHARED(memory);
  FASTMP_SHARED(Shared, shared);
  const Ring<K> ring = Ring<K>::in(shared_address(memory), args.slots);
  const int32_t rank = K::cluster > 1 ? rank_in_cluster() : 0;
  if (thread() == 0) {
    ring.init_barriers();
    init(shared_address(&shared.exchange[0]), K::cluster);
    init(shared_address(&shared.exchange[1]), K::cluster);
    publish_barriers();
  }
  sync_block();
  if constexpr (K::cluster > 1) sync_cluster();
  const int32_t first = block() / K::cluster, step = blocks() / K::cluster;
  if (thread() >= K::threads) {
    if (thread() == K::threads) produce<K>(args, ring, first, step, rank);
    sync_warp();
  } else {
    Consumer<K> consumer = {args, ring, shared, load_constants(args), rank, {0, 0u}, 0};
    Targets targets = load_targets(args, first);
#pragma unroll 1
    for (int32_t turn = first; turn < args.rows; turn += step) {
      const int32_t row = row_at(args, turn);
      if (targets.are_ignored()) {
        consumer.take_ignored_row(row, targets);
        targets = load_targets(args, turn + step);
      } else {
        targets = consumer.take_row(row, targets, turn + step);
      }
    }
  }
  /* The other block may still write to this one's shared memory. */
  if constexpr (K::cluster > 1) sync_cluster();
}

/* at_once: blocks that share the registers of a multiprocessor. */
template <class K, int at_once>
FASTMP_KERNEL(K::threads + kWarp, at_once)
loss_rows(const fastmp_ring_args args) {
  static_assert(K::cluster == 1, "one block a row");
  take_rows<K>(args);
}

template <class K>
FASTMP_CLUSTER_KERNEL(K::threads + kWarp, K::cluster)
loss_half_rows(const fastmp_ring_args args) {
  static_assert(K::cluster == 2, "two blocks a row");
  take_rows<K>(args);
}

struct WarpSums {
  float sums[kThreads / kWarp];
};

/* divisor_partials[t][i] = Σ w_y of target t, over the rows of block i that are not ignored. */
template <int32_t parts>
FASTMP_KERNEL(kThreads, 1)
loss_divisors(const fastmp_ring_args args) {
  FASTMP_SHARED(WarpSums, shared);
  const int64_t* targets[] = {args.target_a, args.target_b};
  for (int t = 0; t < 2 && targets[t] != nullptr; ++t) {
    float sum = 0.0f;
    for (int32_t row = block() * kThreads + thread(); row < args.rows; row += parts * kThreads) {
      const int32_t y = class_of(args, read_only(targets[t] + row));
      sum += y == kOutOfRange ? 0.0f : class_weight(args.weight, y);
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread() % kWarp == 0) shared.sums[thread() / kWarp] = sum;
    sync_block();
    if (thread() == 0) {
      for (int32_t warp = 1; warp < kThreads / kWarp; ++warp) sum += shared.sums[warp];
      args.divisor_partials[t * parts + block()] = sum;
    }
    sync_block();
  }
}

}  // namespace fastmp
