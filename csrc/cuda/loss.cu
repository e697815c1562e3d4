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
 * of them into sums; the block meets once, with a cluster of two once more; the chunks are read a
 * second time, from shared memory, and the gradient is written. Meanwhile the producer fills the
 * chunks that are given back. Rows that no multiprocessor holds are halved between two blocks of a
 * cluster.
 *
 * A thread's sums are relative to the largest logit of its first vector, and not to a running
 * maximum, which would change in nearly every chunk of some lane: terms of up to 2^64 harm no fp32
 * sum. Where they are larger the thread goes over the row once more, relative to its own maximum,
 * which it knows by then. An exponent is one multiply_add (Reference in loss_sums.h), smoothing
 * adds up the exponents themselves.
 *
 * Cycles, for 8,192 x 32,000 in bf16 on an H200 (2026-11-27): 277 us, 89% of a copy, are 7,800 a
 * row. Two exponentials a logit take 4,000 of them on 16 special-function lanes, and overlap with
 * the instructions, which 128 lanes issue: 7.5 a logit in the first pass and 7 in the second (SASS,
 * with smoothing), 6.4 and 5.9 where a thread has two vectors of a chunk, and about 450 a warp for
 * what is done once a row. That is 5,400 with 16 warps. Twelve and ten a logit were 8,400, all
 * that there were at 82% of a copy.
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
  int32_t rank;
  Cursor at;     /* of the next row's first chunk */
  int32_t count; /* rows so far */

  /* This thread's 16 bytes number i of a chunk. */
  __device__ __forceinline__ Vector read_vector(const Cursor& chunk, int i) const {
    Vector v;
    v.bits = load_shared(ring.chunk(chunk) + 16 * thread() + 16 * K::threads * i, Bits());
    return v;
  }

  /* The first class of this thread in a row, and the class after the last vector. */
  __device__ __forceinline__ int32_t first_of(const Slice<T>& slice) const {
    return slice.first + thread() * n;
  }
  __device__ __forceinline__ int32_t end_of(const Slice<T>& slice) const {
    return slice.first + slice.vectors * n;
  }

  /* ---- first pass ---- */

  /* To the largest logit of the thread's first vector: sums and exponentials that are relative to
   * it are seldom too large. */
  __device__ __forceinline__ Reference first_reference(const Slice<T>& slice) const {
    Top<T> top;
    if (first_of(slice) < end_of(slice)) {
      wait(ring.full(at.slot), at.parity);
      top.raise(read_vector(at, 0));
    }
    return reference_to(top.value());
  }

  /* y: class of the thread's first logit. checked: the chunk may be the last one, or a target's. */
  template <bool checked>
  __device__ __forceinline__ void add_chunk(Sums& sums, Top<T>& top, const Reference& reference,
                                            const Cursor& chunk, int32_t y, int32_t end,
                                            const Targets& targets, float* target_logits) const {
    wait(ring.full(chunk.slot), chunk.parity);
#pragma unroll
    for (int i = 0; i < K::each; ++i) {
      const int32_t own = y + i * K::threads * n;
      if (checked && own >= end) break;
      const Vector v = read_vector(chunk, i);
      top.raise(v);
      float z[n];
      unpack_vector<K>(v, z);
      add<K, checked>(sums, reference, z, own, args.weight, targets, target_logits);
    }
  }

  /* Chunks between those that are checked do not look for targets and for the end. */
  __device__ __forceinline__ Sums sum_chunks(const Slice<T>& slice, const Targets& targets,
                                             const Reference& reference,
                                             float* target_logits) const {
    Sums sums = kNothing;
    Top<T> top;
    Cursor chunk = at;
    const int32_t end = end_of(slice);
    int32_t begin = slice.first, y = first_of(slice);
    while (begin < end) {
      /* The chunk of a target, or else the last one. */
      int32_t stop = end - K::chunk_logits;
      if (targets.a >= begin) stop = min_of(stop, targets.a - K::chunk_logits);
      if (targets.b >= begin) stop = min_of(stop, targets.b - K::chunk_logits);
#pragma unroll 1
      for (; begin <= stop; begin += K::chunk_logits, y += K::chunk_logits) {
        add_chunk<false>(sums, top, reference, chunk, y, end, targets, target_logits);
        chunk.advance(ring.slots);
      }
      if (begin >= end) break;
      add_chunk<true>(sums, top, reference, chunk, y, end, targets, target_logits);
      chunk.advance(ring.slots);
      begin += K::chunk_logits;
      y += K::chunk_logits;
    }
    sums.max = top.value();
    if constexpr (K::smooth == Smooth::equal) {
      const int32_t mine = (slice.vectors - thread() + K::threads - 1) / K::threads;
      sums.count = static_cast<float>(mine * n);
    }
    return sums;
  }

  /* Over this thread's part of a row. */
  __device__ __forceinline__ Sums sum_row(const Slice<T>& slice, const Targets& targets,
                                          const Reference& reference, int32_t edge,
                                          float edge_logit) const {
    float* target_logits = shared.target_logits[count & 1];
    Sums sums = sum_chunks(slice, targets, reference, target_logits);
    if (edge >= 0) {
      float z[1] = {edge_logit};
      sums.max = larger(sums.max, edge_logit);
      if (K::smooth == Smooth::equal) sums.count += 1.0f;
      add<K, true>(sums, reference, z, edge, args.weight, targets, target_logits);
    }
    return sums;
  }

  __device__ __forceinline__ Totals sum_over_block(const Sums& sums,
                                                   const Reference& reference) const {
    Sums* warps = shared.warps[count & 1];
    const Sums warp = sum_over_warp<K>(sums, reference);
    if (thread() % kWarp == 0) warps[thread() / kWarp] = warp;
    sync_first_threads<K::threads>();
    const float* z = shared.target_logits[count & 1];
    return {sum_over_warps<K>(warps), z[0], z[1]};
  }

  /* ---- second pass ---- */

  /* All lanes of the warp have read the chunk for the last time. */
  __device__ __forceinline__ void give_back(const Cursor& chunk) const {
    sync_warp();
    if (thread() % kWarp == 0) arrive(ring.empty(chunk.slot));
  }

  template <bool checked>
  __device__ __forceinline__ void write_chunk(const Gradient& g, int32_t y, int32_t end, T* to) {
    Vector v[K::each];
#pragma unroll
    for (int i = 0; i < K::each; ++i) {
      if (!checked || y + i * K::threads * n < end) v[i] = read_vector(at, i);
    }
    give_back(at);
    at.advance(ring.slots);
#pragma unroll
    for (int i = 0; i < K::each; ++i) {
      const int32_t own = y + i * K::threads * n;
      if (checked && own >= end) break;
      float z[n];
      unpack_vector<K>(v[i], z);
      for (int e = 0; e < n; ++e) z[e] = gradient_at<K>(g, z[e], own + e, args.weight);
      store_vector(pack_vector<K>(z), reinterpret_cast<Bits*>(to + i * K::threads * n));
    }
  }

  __device__ __forceinline__ void write_vectors(const Slice<T>& slice, const Gradient& g, T* grad) {
    const int32_t end = end_of(slice);
    int32_t begin = slice.first, y = first_of(slice);
    T* to = grad + y;
#pragma unroll 1
    for (; begin <= end - K::chunk_logits; begin += K::chunk_logits) {
      write_chunk<false>(g, y, end, to);
      y += K::chunk_logits;
      to += K::chunk_logits;
    }
    if (begin < end) write_chunk<true>(g, y, end, to);
  }

  /* The gradient starts elsewhere within 16 bytes: neighbouring threads take neighbouring logits,
   * 64 bytes a warp and store. */
  __device__ __forceinline__ void write_elements(const Slice<T>& slice, const Gradient& g,
                                                 T* grad) {
    const int32_t end = end_of(slice);
#pragma unroll 1
    for (int32_t begin = slice.first; begin < end; begin += K::chunk_logits) {
      const int32_t y = begin + thread();
      const SharedAddress from = ring.chunk(at) + thread() * sizeof(T);
      T items[n * K::each];
#pragma unroll
      for (int e = 0; e < n * K::each; ++e) {
        if (y + e * K::threads < end) {
          items[e] = load_shared(from + e * K::threads * sizeof(T), T());
        }
      }
      give_back(at);
      at.advance(ring.slots);
#pragma unroll
      for (int e = 0; e < n * K::each; ++e) {
        const int32_t own = y + e * K::threads;
        if (own < end) write_element(g, to_float(items[e]), own, grad);
      }
    }
  }

  __device__ __forceinline__ void write_element(const Gradient& g, float z, int32_t y,
                                                T* grad) const {
    store(gradient_at<K>(g, z, y, args.weight), grad + y);
  }

  /* Over what this thread has written, where that is a target's. */
  __device__ __forceinline__ void write_target(const Slice<T>& slice, int32_t y, float value,
                                               int32_t edge, T* grad) const {
    const int32_t past = y - slice.first;
    const int32_t unit = K::aligned ? past / n : past;
    const bool in_vectors = past >= 0 && y < end_of(slice);
    const bool own = in_vectors ? unit % K::threads == thread() : y >= 0 && y == edge;
    if (own) store(value, grad + y);
  }

  __device__ __forceinline__ void take_row() {
    wait(ring.full(at.slot), at.parity);
    const Plan<T>& plan = ring.plans[at.slot];
    if (plan.targets.are_ignored()) {
      take_ignored_row(plan);
      give_back(at);
      at.advance(ring.slots);
      return;
    }
    int32_t edge;
    float edge_logit;
    Reference reference;
    Sums sums;
    {
      const Slice<T> slice = plan.slice;
      const Targets targets = plan.targets;
      edge = edge_class<K>(slice, args.classes, rank);
      edge_logit = edge >= 0 ? to_float(slice.logits[edge]) : 0.0f;
      reference = first_reference(slice);
      for (;;) {
        sums = sum_row(slice, targets, reference, edge, edge_logit);
        if (!(reference.exponent(sums.max) > kFar)) break;
        reference = reference_to(sums.max); /* the sums may be inf: once more */
      }
    }
    Totals totals = sum_over_block(sums, reference);
    const Targets targets = plan.targets;
    if constexpr (K::cluster > 1) {
      totals = sum_over_cluster(totals, targets, plan.slice.split, rank, count, shared);
    }
    ++count;
    const bool stores_loss = thread() == K::threads - kWarp && rank == 0;
    const Gradient g = finish_row(args, totals, plan, stores_loss);
    const Slice<T> slice = plan.slice; /* the plan is given back with the first chunk */
    T* grad = plan.grad;
    if constexpr (K::aligned) {
      write_vectors(slice, g, grad);
    } else {
      write_elements(slice, g, grad);
    }
    if (slice.vectors == 0) { /* a chunk without bytes */
      give_back(at);
      at.advance(ring.slots);
    }
    if (edge >= 0) write_element(g, edge_logit, edge, grad);
    write_target(slice, targets.a, g.at_a, edge, grad);
    write_target(slice, targets.b, g.at_b, edge, grad);
  }

  /* Loss and gradient 0; the loss is NaN where a divisor is 0, as torch's. */
  __device__ __forceinline__ void take_ignored_row(const Plan<T>& plan) const {
    const Slice<T> slice = plan.slice;
    const int32_t edge = edge_class<K>(slice, args.classes, rank);
    T* to = plan.grad + slice.first;
    if constexpr (K::aligned) {
      const float zeros[n] = {};
#pragma unroll 1
      for (int32_t i = thread(); i < slice.vectors; i += K::threads) {
        store_vector(pack_vector<K>(zeros), reinterpret_cast<Bits*>(to) + i);
      }
    } else {
#pragma unroll 1
      for (int32_t i = thread(); i < slice.vectors * n; i += K::threads) store(0.0f, to + i);
    }
    if (edge >= 0) store(0.0f, plan.grad + edge);
    if (thread() == 0 && rank == 0) {
      store_loss(args, {kNothing, 0.0f, 0.0f}, {0.0f, 0.0f, 1.0f, 1.0f}, plan);
    }
  }
};

/* ---- kernels ---- */

/* K::threads consumers and one warp of which a thread is the producer. */
template <class K>
FASTMP_DEVICE void take_rows(const fastmp_ring_args& args) {
  FASTMP_DYNAMIC_SHARED(memory);
  FASTMP_SHARED(Shared, shared);
  const Ring<K> ring = Ring<K>::in(memory, args.slots);
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
    const Constants constants = load_constants(args);
    if (thread() == K::threads) produce<K>(args, ring, constants, first, step, rank);
    sync_warp();
  } else {
    Consumer<K> consumer = {args, ring, shared, rank, {0, 0u}, 0};
#pragma unroll 1
    for (int32_t turn = first; turn < args.rows; turn += step) consumer.take_row();
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
