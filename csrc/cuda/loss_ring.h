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

#include "loss_plan.h"

namespace fastmp {

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

/* Chunks, then the barriers: `full` of each chunk, `empty` of each, then a plan for each. */
template <class K>
struct Ring {
  SharedAddress chunks, barriers;
  Plan<typename K::T>* plans;
  int32_t slots;

  static __device__ __forceinline__ Ring in(unsigned char* memory, int32_t slots) {
    unsigned char* barriers = memory + slots * K::chunk;
    unsigned char* plans = barriers + 2 * slots * sizeof(Barrier);
    return {shared_address(memory), shared_address(barriers),
            reinterpret_cast<Plan<typename K::T>*>(plans), slots};
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

/* ---- the producer ---- */

/* Blocks of a multiprocessor do not advance alike: the scheduler prefers the warps of the older
 * one. With an equal share for each, the first blocks of an H200 were done after 60% of the time
 * (8,192 x 32,000), and nothing hid the meetings of those left. So a block has two rows for
 * certain, and takes others when it is ready for them. The two blocks of a cluster are alone and
 * share theirs. */
template <class K>
FASTMP_DEVICE int32_t turn_after(const fastmp_ring_args& args, int32_t turn, int32_t step) {
  if (K::cluster > 1) return turn + step;
  return turn < args.rows ? 2 * step + atomic_add(args.taken, 1) : turn;
}

/* One thread. Rows are skipped whose targets are all ignored: they may hold anything. These, and
 * rows without a whole vector, take a chunk without bytes. */
template <class K>
FASTMP_DEVICE void produce(const fastmp_ring_args& args, const Ring<K>& ring,
                           const Constants& constants, int32_t first, int32_t step, int32_t rank) {
  Cursor at = {0, 0u};
  TargetPair pair = read_targets(args, first);
  int32_t next = first + step;
#pragma unroll 1
  for (int32_t turn = first; turn < args.rows;) {
    const Targets targets = classes_of(args, pair);
    /* A row ahead, and its number two: the copies do not wait for them. */
    pair = read_targets(args, next);
    const int32_t after = turn_after<K>(args, next, step);
    const auto plan = plan_row<K>(args, constants, targets, row_at(args, turn), rank);
    const int32_t vectors = targets.are_ignored() ? 0 : plan.slice.vectors;
    wait(ring.empty(at.slot), at.parity ^ 1u);
    ring.plans[at.slot] = plan;
    if (vectors == 0) {
      arrive(ring.full(at.slot));
      at.advance(ring.slots);
    }
#pragma unroll 1
    for (int32_t done = 0; done < vectors; done += K::chunk_vectors) {
      const int32_t bytes = 16 * min_of(K::chunk_vectors, vectors - done);
      wait(ring.empty(at.slot), at.parity ^ 1u);
      arrive_expecting(ring.full(at.slot), bytes);
      copy_bulk(ring.chunk(at), plan.slice.logits + plan.slice.first + done * K::vector, bytes,
                ring.full(at.slot));
      at.advance(ring.slots);
    }
    turn = next;
    next = after;
  }
  wait(ring.empty(at.slot), at.parity ^ 1u);
  ring.plans[at.slot].row = kNoRow;
  arrive(ring.full(at.slot));
}

}  // namespace fastmp
#endif
