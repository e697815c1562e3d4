/* A row of the loss, by the threads that add it up and write its gradient. Formulas: loss.cu. */
#ifndef FASTMP_LOSS_CONSUMER_H
#define FASTMP_LOSS_CONSUMER_H

#include "loss_gradient.h"

namespace fastmp {

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

  /* Returns whether there was one. */
  __device__ __forceinline__ bool take_row() {
    wait(ring.full(at.slot), at.parity);
    const Plan<T>& plan = ring.plans[at.slot];
    if (plan.row == kNoRow) return false;
    if (plan.targets.are_ignored()) {
      take_ignored_row(plan);
      give_back(at);
      at.advance(ring.slots);
      return true;
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
    return true;
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

}  // namespace fastmp
#endif
