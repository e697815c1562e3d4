/* The ring of the loss: rows of logits on their way through shared memory.
 *
 * One thread, the producer, copies rows into a ring of chunks of 16 bytes a consumer thread. Each
 * chunk has two barriers: `full` ends a phase when the bytes have come, `empty` when every consumer
 * warp has read them for the last time. The ring holds at least one row: consumers go over a row
 * twice, and give its chunks back the second time, one by one, to those of the next row.
 *
 * Bulk copies move whole 16-byte vectors. Up to 7 logits before the first vector of a row, and
 * after its last, are edges: one thread loads each. In a cluster of two each block has one half of
 * the vectors, the first the left edge, the last the right one. */
#ifndef FASTMP_LOSS_RING_H
#define FASTMP_LOSS_RING_H

#include "async.h"

namespace fastmp {

/* What the kernel is compiled for. */
enum class Smooth { none, equal, weighted };

/* aligned: the gradient has its 16-byte boundaries where the logits have theirs. */
template <class T_, Smooth smooth_, bool aligned_, int threads_, int cluster_>
struct Config {
  typedef T_ T;
  static constexpr Smooth smooth = smooth_;
  static constexpr bool aligned = aligned_;
  static constexpr int threads = threads_; /* consumers */
  static constexpr int cluster = cluster_;
  static constexpr int warps = threads_ / kWarp;
  static constexpr int vector = 16 / sizeof(T_); /* logits in 16 bytes */
  static constexpr int chunk = 16 * threads_;    /* bytes */
  static_assert(warps <= kWarp, "the sums of all warps are one warp's");
  static_assert(threads_ >= 2 * vector, "a thread for each edge logit");
};

/* Where a chunk goes, and the parity of the phase that it takes there. */
struct Cursor {
  int32_t slot;
  uint32_t parity;

  __device__ __forceinline__ void advance(int32_t slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1u;
    }
  }
};

/* Chunks, then the barriers: `full` of each chunk, `empty` of each. */
template <class K>
struct Ring {
  SharedAddress chunks, barriers;
  int32_t slots;

  static __device__ __forceinline__ Ring in(SharedAddress memory, int32_t slots) {
    return {memory, memory + slots * K::chunk, slots};
  }
  __device__ __forceinline__ SharedAddress chunk(const Cursor& at) const {
    return chunks + at.slot * K::chunk;
  }
  __device__ __forceinline__ SharedAddress full(int32_t slot) const {
    return barriers + slot * sizeof(Barrier);
  }
  __device__ __forceinline__ SharedAddress empty(int32_t slot) const {
    return barriers + (slots + slot) * sizeof(Barrier);
  }

  /* By one thread, before all others. */
  __device__ __forceinline__ void init_barriers() const {
#pragma unroll 1
    for (int32_t slot = 0; slot < slots; ++slot) {
      init(full(slot), 1);
      init(empty(slot), K::warps);
    }
  }
};

/* ---- rows ---- */

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

/* Past the last row: ignored. */
FASTMP_DEVICE TargetPair read_targets(const fastmp_ring_args& args, int32_t turn) {
  TargetPair pair = {args.ignore_index, args.ignore_index};
  if (turn < args.rows) {
    pair.a = read_only(args.target_a + row_at(args, turn));
    if (args.target_b != nullptr) pair.b = read_only(args.target_b + row_at(args, turn));
  }
  return pair;
}

FASTMP_DEVICE Targets classes_of(const fastmp_ring_args& args, const TargetPair& pair) {
  return {class_of(args, pair.a), class_of(args, pair.b)};
}

FASTMP_DEVICE Targets load_targets(const fastmp_ring_args& args, int32_t turn) {
  return classes_of(args, read_targets(args, turn));
}

/* ---- the producer ---- */

/* One thread. Rows are skipped whose targets are all ignored: they may hold anything. */
template <class K>
FASTMP_DEVICE void produce(const fastmp_ring_args& args, const Ring<K>& ring, int32_t first,
                           int32_t step, int32_t rank) {
  Cursor at = {0, 0u};
  TargetPair pair = read_targets(args, first);
#pragma unroll 1
  for (int32_t turn = first; turn < args.rows; turn += step) {
    const Targets targets = classes_of(args, pair);
    pair = read_targets(args, turn + step); /* a row ahead: the copies do not wait for them */
    const auto slice = slice_of<K>(args, row_at(args, turn), rank);
    const int32_t vectors = targets.are_ignored() ? 0 : slice.vectors;
#pragma unroll 1
    for (int32_t done = 0; done < vectors; done += K::threads) {
      const int32_t bytes = 16 * min_of(K::threads, vectors - done);
      wait(ring.empty(at.slot), at.parity ^ 1u);
      arrive_expecting(ring.full(at.slot), bytes);
      copy_bulk(ring.chunk(at), slice.logits + slice.first + done * K::vector, bytes,
                ring.full(at.slot));
      at.advance(ring.slots);
    }
  }
}

}  // namespace fastmp
#endif
