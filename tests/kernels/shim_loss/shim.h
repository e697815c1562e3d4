/* csrc/cuda/loss.cu on a CPU: a thread for every thread of the grid, std::barrier for the barriers
 * of blocks, warps and clusters, a counter that is waited for in place of a barrier in shared
 * memory, a loop for bulk copies (ThreadSanitizer sees no memcpy that is inlined). The functions of
 * device.h and async.h are defined here, and their include guards keep them out. */
#ifndef FASTMP_LOSS_SHIM_H
#define FASTMP_LOSS_SHIM_H
#define FASTMP_DEVICE_H
#define FASTMP_ASYNC_H
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "common/numerics.h"

#define __device__
#define __forceinline__ inline
#define FASTMP_DEVICE static inline
#define FASTMP_KERNEL(threads, blocks) static void
#define FASTMP_CLUSTER_KERNEL(threads, blocks) static void
#define FASTMP_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(here.block->shared)
#define FASTMP_DYNAMIC_SHARED(name) unsigned char* name = here.block->ring.get()

namespace fastmp {

constexpr int kConsumers = 16; /* four small warps: barriers of real threads are slow */
constexpr int kWarp = 4;
constexpr int kThreads = kConsumers + kWarp;
constexpr int32_t kDivisorParts = 2;
constexpr size_t kSharedBytes = 2048;

/* One that a test takes out, to see that its absence is noticed. */
enum class Missing { none, full, empty, block, warp, cluster, launch };
static Missing missing = Missing::none;

struct Block {
  std::barrier<> all{kThreads}, consumers{kConsumers};
  std::unique_ptr<std::barrier<>> warps[kThreads / kWarp];
  std::barrier<>* cluster = nullptr;
  Block* in_cluster[2];
  alignas(16) unsigned char lanes[kThreads][16];
  alignas(16) unsigned char shared[kSharedBytes];
  const std::atomic<bool>* previous_ended = nullptr; /* of the launch before; NULL: it has */
  std::unique_ptr<unsigned char, decltype(&std::free)> ring{nullptr, std::free};
  size_t ring_bytes = 0;

  Block() {
    for (auto& warp : warps) warp = std::make_unique<std::barrier<>>(kWarp);
  }
};

#include "../grid.h"
FASTMP_DEVICE void sync_warp() {
  if (missing != Missing::warp) here.block->warps[here.thread / kWarp]->arrive_and_wait();
}
template <int count>
FASTMP_DEVICE void sync_first_threads() {
  static_assert(count == kConsumers);
  if (missing != Missing::block) here.block->consumers.arrive_and_wait();
}

template <class T>
FASTMP_DEVICE T shuffle_xor(T value, int mask) {
  std::barrier<>& warp = *here.block->warps[here.thread / kWarp];
  std::memcpy(here.block->lanes[here.thread], &value, sizeof value);
  warp.arrive_and_wait();
  std::memcpy(&value, here.block->lanes[here.thread ^ mask], sizeof value);
  warp.arrive_and_wait();
  return value;
}

FASTMP_DEVICE float larger(float a, float b) {
  return std::fmax(a, b);
}
FASTMP_DEVICE float max_over_warp(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
  return value;
}

typedef uintptr_t SharedAddress;

FASTMP_DEVICE SharedAddress shared_address(const void* pointer) {
  return reinterpret_cast<SharedAddress>(pointer);
}
template <class T>
FASTMP_DEVICE T load_shared(SharedAddress from, T) {
  if (from % sizeof(T) != 0) __builtin_trap();
  return *reinterpret_cast<const T*>(from);
}

/* ---- barriers in shared memory: phase, arrivals of a phase, those and the bytes to come ---- */

struct Counts {
  uint16_t phase, arrivals, pending;
  int16_t vectors; /* of 16 bytes; may be negative for a moment, as bytes may */
};
struct Barrier {
  std::atomic<Counts> counts;
};
static_assert(sizeof(Barrier) == 8);

template <class Change>
FASTMP_DEVICE void change(SharedAddress at, const Change& apply) {
  auto* barrier = reinterpret_cast<Barrier*>(at);
  Counts now = barrier->counts.load(), next;
  do {
    next = now;
    apply(next);
    if (next.pending == 0 && next.vectors == 0) {
      next.phase ^= 1;
      next.pending = next.arrivals;
    }
  } while (!barrier->counts.compare_exchange_weak(now, next));
  if (now.phase != next.phase) barrier->counts.notify_all();
}

FASTMP_DEVICE void init(SharedAddress at, int32_t arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  reinterpret_cast<Barrier*>(at)->counts.store({0, count, count, 0});
}
FASTMP_DEVICE void publish_barriers() {}
FASTMP_DEVICE void arrive(SharedAddress barrier) {
  change(barrier, [](Counts& counts) { --counts.pending; });
}
FASTMP_DEVICE void arrive_expecting(SharedAddress barrier, int32_t bytes) {
  change(barrier, [&](Counts& counts) {
    --counts.pending;
    counts.vectors = static_cast<int16_t>(counts.vectors + bytes / 16);
  });
}
FASTMP_DEVICE void wait_for_phase(SharedAddress at, uint32_t parity) {
  auto* barrier = reinterpret_cast<Barrier*>(at);
  Counts now = barrier->counts.load();
  while (now.phase == parity) {
    barrier->counts.wait(now);
    now = barrier->counts.load();
  }
}
FASTMP_DEVICE void wait(SharedAddress at, uint32_t parity) {
  const bool producer = here.thread >= kConsumers;
  if (missing != (producer ? Missing::empty : Missing::full)) {
    wait_for_phase(at, parity);
  } else if (producer) { /* or it would be done before a consumer has begun */
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  } else { /* a plan that is not there is no address to read from: late, and without order */
    const auto& counts = reinterpret_cast<Barrier*>(at)->counts;
    while (counts.load(std::memory_order_relaxed).phase == parity) std::this_thread::yield();
  }
}

/* As strict as the GPU is: an address or a size that it would fault at ends the test. */
FASTMP_DEVICE void copy_bulk(SharedAddress to, const void* from, int32_t bytes,
                             SharedAddress barrier) {
  const auto any = to | reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(bytes);
  if (any % 16 != 0 || bytes <= 0) __builtin_trap();
  const auto* words = static_cast<const uint64_t*>(from);
  for (int32_t i = 0; i < bytes / 8; ++i) reinterpret_cast<uint64_t*>(to)[i] = words[i];
  change(barrier, [&](Counts& counts) {
    counts.vectors = static_cast<int16_t>(counts.vectors - bytes / 16);
  });
}

/* ---- launches that overlap, where a test lets them ---- */

FASTMP_DEVICE void allow_next_launch() {}
FASTMP_DEVICE void wait_for_previous_launch() {
  const auto* ended = here.block->previous_ended;
  if (ended == nullptr) return;
  if (missing != Missing::launch) return ended->wait(false);
  while (!ended->load(std::memory_order_relaxed)) std::this_thread::yield(); /* late, no order */
}

/* ---- clusters ---- */

FASTMP_DEVICE int32_t rank_in_cluster() {
  return here.index % here.cluster;
}
FASTMP_DEVICE void sync_cluster() {
  here.block->cluster->arrive_and_wait();
}
FASTMP_DEVICE SharedAddress in_rank(SharedAddress address, int32_t rank) {
  const auto offset = address - shared_address(here.block->shared);
  if (offset >= kSharedBytes) __builtin_trap();
  return shared_address(here.block->in_cluster[rank]->shared) + offset;
}
FASTMP_DEVICE void store_in_rank(SharedAddress to, float value, int32_t rank) {
  *reinterpret_cast<float*>(in_rank(to, rank)) = value;
}
FASTMP_DEVICE void arrive_in_rank(SharedAddress barrier, int32_t rank) {
  arrive(in_rank(barrier, rank));
}
FASTMP_DEVICE void wait_for_cluster(SharedAddress barrier, uint32_t parity) {
  if (missing != Missing::cluster) wait_for_phase(barrier, parity);
}

/* ---- memory and arithmetic ---- */

FASTMP_DEVICE int32_t atomic_add(int32_t* sum, int32_t value) {
  return __atomic_fetch_add(sum, value, __ATOMIC_RELAXED);
}

template <int bytes>
struct Access {
  struct alignas(bytes) Bits {
    unsigned char byte[bytes];
  };
};
template <class T>
FASTMP_DEVICE T read_only(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) __builtin_trap();
  return *from;
}
template <class T>
FASTMP_DEVICE void store_vector(T value, T* to) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) __builtin_trap();
  *to = value;
}

FASTMP_DEVICE float exp2_fast(float x) {
  return std::exp2(x);
}
FASTMP_DEVICE float reciprocal(float x) {
  return 1.0f / x;
}
FASTMP_DEVICE float log_of(float x) {
  return std::log(x);
}
FASTMP_DEVICE float log_1_plus(float x) {
  return std::log1p(x);
}
FASTMP_DEVICE constexpr uint32_t lowest_pair(bf16) {
  return 0xff7fff7fu;
}
FASTMP_DEVICE constexpr uint32_t lowest_pair(f16) {
  return 0xfbfffbffu;
}

template <class T>
FASTMP_DEVICE void unpack(uint32_t pair, float& low, float& high, T) {
  low = to_float(T{static_cast<uint16_t>(pair)});
  high = to_float(T{static_cast<uint16_t>(pair >> 16)});
}
template <class T>
FASTMP_DEVICE uint32_t pack(float low, float high, T) {
  T a, b;
  store(low, &a);
  store(high, &b);
  return static_cast<uint32_t>(b.bits) << 16 | a.bits;
}
template <class T>
FASTMP_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b, T) {
  float low_a, high_a, low_b, high_b;
  unpack(a, low_a, high_a, T());
  unpack(b, low_b, high_b, T());
  return pack(larger(low_a, low_b), larger(high_a, high_b), T());
}

}  // namespace fastmp

#include "cuda/loss.cu"

namespace fastmp {

typedef void (*LossKernel)(const fastmp_ring_args);

/* One block takes two vectors of a chunk a thread, two take one. */
template <class T, Smooth smooth, bool aligned, int cluster>
static LossKernel loss_kernel() {
  typedef Config<T, smooth, aligned, kConsumers, cluster, cluster == 1 ? 2 : 1> K;
  if constexpr (cluster == 1) {
    return loss_rows<K, 1>;
  } else {
    return loss_half_rows<K>;
  }
}

/* A grid whose threads wait for the next launch: new threads take a millisecond each. They end with
 * the process. */
struct Grid {
  Grid(int32_t count, int32_t cluster)
      : gate(count * kThreads + 1), blocks(static_cast<size_t>(count)) {
    for (int32_t b = 0; b < count; ++b) {
      if (b % cluster == 0) {
        clusters.push_back(std::make_unique<std::barrier<>>(cluster * kThreads));
      }
      Block& block = blocks[static_cast<size_t>(b)];
      block.cluster = clusters.back().get();
      for (int32_t rank = 0; rank < cluster; ++rank) {
        block.in_cluster[rank] = &blocks[static_cast<size_t>(b / cluster * cluster + rank)];
      }
      for (int32_t t = 0; t < kThreads; ++t) {
        std::thread([this, &block, b, t, count, cluster] {
          here = {t, b, count, cluster, &block};
          for (;;) {
            gate.arrive_and_wait();
            kernel(*args);
            gate.arrive_and_wait();
          }
        }).detach();
      }
    }
  }

  /* Shared memory starts as NaN. */
  void launch(LossKernel chosen, const fastmp_ring_args* given, size_t ring_bytes,
              const std::atomic<bool>* previous_ended) {
    kernel = chosen;
    args = given;
    for (Block& block : blocks) {
      std::memset(block.shared, 0xff, kSharedBytes);
      block.previous_ended = previous_ended;
      if (block.ring_bytes != ring_bytes) {
        block.ring.reset(
            static_cast<unsigned char*>(std::aligned_alloc(128, (ring_bytes + 127) / 128 * 128)));
        block.ring_bytes = ring_bytes;
      }
      std::memset(block.ring.get(), 0xff, ring_bytes);
    }
    gate.arrive_and_wait();
    gate.arrive_and_wait();
  }

  std::barrier<> gate;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<std::barrier<>>> clusters;
  LossKernel kernel = nullptr;
  const fastmp_ring_args* args = nullptr;
};

static void launch(LossKernel kernel, int32_t blocks, int32_t cluster, const fastmp_ring_args* args,
                   size_t ring_bytes, const std::atomic<bool>* previous_ended = nullptr) {
  static std::map<std::pair<int32_t, int32_t>, Grid*> grids;
  static std::mutex lock;
  Grid* grid;
  {
    const std::lock_guard<std::mutex> hold(lock);
    Grid*& found = grids[{blocks, cluster}];
    if (found == nullptr) found = new Grid(blocks, cluster);
    grid = found;
  }
  grid->launch(kernel, args, ring_bytes, previous_ended);
}

}  // namespace fastmp
#endif
