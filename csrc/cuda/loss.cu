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
 * those. backends/cuda/loss.py has the sizes, and what a prototype reached with them; this kernel
 * has not run on a GPU yet. z - row_max is a
 * subtraction of its own: as z log2(e) - row_max log2(e), one instruction less, it would be wrong
 * by the rounding of the second product, 2^64 at -1e9 in all places.
 *
 * Every sum has one order: 16 bytes, chunks, lanes, warps, halves. */
#include "loss_gradient.h"

namespace fastmp {

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
      store_loss(args, constants, {kNothing, 0.0f, 0.0f}, {0.0f, 0.0f, 1.0f, 1.0f}, targets, w,
                 row);
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
