/* csrc/cuda/update.cu on a CPU: a thread for every thread of the grid, a barrier for every barrier.
 * The functions of device.h are defined here, and its include guard keeps it out. */
#define FASTMP_DEVICE_H
#include <barrier>
#include <cmath>
#include <cstring>
#include <map>
#include <thread>
#include <vector>

#include "../../../csrc/common/table.h"

#define __device__
#define __forceinline__ inline
#define FASTMP_DEVICE static inline
#define FASTMP_KERNEL(threads, blocks) void
#define FASTMP_ARGUMENT(Type, name) const Type& name
#define FASTMP_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(here.block->shared)

namespace fastmp {

constexpr int kThreads = 16; /* two small warps: barriers of real threads are slow */
constexpr int kWarp = 8;

struct Block {
  std::barrier<> all{kThreads};
  std::barrier<> warp[kThreads / kWarp]{std::barrier<>(kWarp), std::barrier<>(kWarp)};
  alignas(8) unsigned char lanes[kThreads][8];
  alignas(16) unsigned char shared[1024];
};

#include "../grid.h"

template <class T>
FASTMP_DEVICE T shuffle_down(T value, int offset) {
  std::barrier<>& warp = here.block->warp[here.thread / kWarp];
  std::memcpy(here.block->lanes[here.thread], &value, sizeof value);
  warp.arrive_and_wait();
  if (here.thread % kWarp + offset < kWarp) {
    std::memcpy(&value, here.block->lanes[here.thread + offset], sizeof value);
  }
  warp.arrive_and_wait();
  return value;
}

constexpr int kGroup = 4;
FASTMP_DEVICE uint32_t shuffle_in_group(uint32_t value, int offset) {
  Block& block = *here.block;
  std::barrier<>& warp = block.warp[here.thread / kWarp];
  std::memcpy(block.lanes[here.thread], &value, sizeof value);
  warp.arrive_and_wait();
  std::memcpy(&value, block.lanes[here.thread ^ offset], sizeof value);
  warp.arrive_and_wait();
  return value;
}

FASTMP_DEVICE bool any_in_warp(bool condition) {
  Block& block = *here.block;
  std::barrier<>& warp = block.warp[here.thread / kWarp];
  block.lanes[here.thread][0] = condition;
  warp.arrive_and_wait();
  bool any = false;
  for (int lane = 0; lane < kWarp; ++lane) {
    any = any || block.lanes[here.thread / kWarp * kWarp + lane][0] != 0;
  }
  warp.arrive_and_wait();
  return any;
}

FASTMP_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i) & 15u;
    const uint32_t byte = (digit & 4u ? b : a) >> (8 * (digit & 3u)) & 255u;
    result |= (digit & 8u ? (byte & 128u ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
}

/* Wrong in the last place, as on a GPU. */
FASTMP_DEVICE float approximate_rsqrt(float x) {
  return std::nextafter(1.0f / std::sqrt(x), 0.0f);
}
FASTMP_DEVICE float approximate_reciprocal(float x) {
  return std::nextafter(1.0f / x, 0.0f);
}
FASTMP_DEVICE float magnitude_of(float x) {
  return std::fabs(x);
}
template <class Kept>
FASTMP_DEVICE uint32_t mask_of(uint32_t pair, const Kept& kept) {
  return (kept(pair & 0x7fffu) ? 0xffffu : 0u) | (kept(pair >> 16 & 0x7fffu) ? 0xffff0000u : 0u);
}
FASTMP_DEVICE uint32_t remainder_mask(uint32_t pair) {
  return mask_of(pair, [](uint32_t magnitude) { return magnitude != 0u && magnitude < 0x7f80u; });
}
FASTMP_DEVICE uint32_t nonzero_mask(uint32_t pair) {
  return mask_of(pair, [](uint32_t magnitude) { return magnitude != 0u; });
}

FASTMP_DEVICE uint32_t atomic_add_acq_rel(uint32_t* sum, uint32_t value) {
  return __atomic_fetch_add(sum, value, __ATOMIC_SEQ_CST);
}
FASTMP_DEVICE uint32_t load_acquire(const uint32_t* sum) {
  std::this_thread::yield();
  return __atomic_load_n(sum, __ATOMIC_SEQ_CST);
}

/* As strict as the GPU is: an access at an address that it would fault at ends the test. */
template <int bytes>
struct Access {
  struct alignas(bytes) Bits {
    unsigned char byte[bytes];
  };
};
template <>
struct Access<8> {
  struct alignas(8) Bits {
    uint32_t x, y;
  };
};
template <>
struct Access<16> {
  struct alignas(16) Bits {
    uint32_t x, y, z, w;
  };
};
template <class T>
FASTMP_DEVICE T read_only(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) __builtin_trap();
  return *from;
}
template <class T>
FASTMP_DEVICE T load(const T* from) {
  return read_only(from);
}
template <class T>
FASTMP_DEVICE void store_bits(T value, T* to) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) __builtin_trap();
  *to = value;
}

}  // namespace fastmp

#include "../../../csrc/cuda/update.cu"

namespace fastmp {

/* Every case there can be; kinds of states and averages with gradients of the weight's dtype. */
#define FASTMP_GRADS(Rule, Param, master)                                                \
  Case<Rule, Param, float, master>, Case<Rule, Param, f16, master>,                      \
      Case<Rule, Param, bf16, master>, Case<Rule, Param, Param, master, StateF32, true>, \
      Case<Rule, Param, Param, master, StateBf16>,                                       \
      Case<Rule, Param, Param, master, StateBf16, true>,                                 \
      Case<Rule, Param, Param, master, State8Bit>,                                       \
      Case<Rule, Param, Param, master, State8Bit, true>
#define FASTMP_CASES(Rule)                                                                     \
  FASTMP_GRADS(Rule, float, FASTMP_SELF), FASTMP_GRADS(Rule, f16, FASTMP_FULL),                \
      FASTMP_GRADS(Rule, bf16, FASTMP_FULL), FASTMP_GRADS(Rule, bf16, FASTMP_SPLIT),           \
      Case<Rule, f16, f16, FASTMP_SPLIT>, Case<Rule, f16, f16, FASTMP_SPLIT, State8Bit, true>, \
      FASTMP_GRADS(Rule, bf16, FASTMP_OUTPUT),
/* Muon's second pass reads bf16 directions, its first writes them whatever the gradients. */
#define FASTMP_MUON_CASES                                            \
  Case<MuonRule, float, bf16, FASTMP_SELF, StateF32, true>,          \
      Case<MuonRule, f16, bf16, FASTMP_FULL, StateF32, true>,        \
      Case<MuonMomentumRule, bf16, float, FASTMP_OUTPUT, StateBf16>, \
      Case<MuonMomentumRule, bf16, f16, FASTMP_OUTPUT, StateBf16>,
template <class... Cases>
struct All {};

/* The last one, which ends the list, matches nothing. */
typedef All<FASTMP_RULES(FASTMP_CASES) FASTMP_MUON_CASES Case<LionRule, float, float, 99>> Every;

/* A kernel of cases without bf16 states, whose blocks may go through a row together. */
#define FASTMP_SHARED_KINDS(Rule, Param, master)                                      \
  Case<Rule, Param, Param, master>, Case<Rule, Param, Param, master, StateF32, true>, \
      Case<Rule, Param, Param, master, State8Bit>,                                    \
      Case<Rule, Param, Param, master, State8Bit, true>
#define FASTMP_SHARED_CASES(Rule)                                                             \
  FASTMP_SHARED_KINDS(Rule, float, FASTMP_SELF), FASTMP_SHARED_KINDS(Rule, f16, FASTMP_FULL), \
      FASTMP_SHARED_KINDS(Rule, bf16, FASTMP_SPLIT)
typedef All<FASTMP_SHARED_CASES(AdamRule<false>), FASTMP_SHARED_CASES(LionRule)> Sharing;

template <class... Cases>
static bool serves(All<Cases...>, const fastmp_step_args& args) {
  for (int32_t i = 0; i < args.row_count; ++i) {
    if (!(Cases::matches(args.rows[i]) || ...)) return false;
  }
  return true;
}

template <class... Cases>
static void launch(All<Cases...>, const fastmp_step_args& args) {
  update<1, Cases...>(reinterpret_cast<const Argument<1>&>(args));
}

}  // namespace fastmp

/* A grid whose threads wait for the next launch: new threads took 8 ms a launch. They end with the
 * process. */
struct Grid {
  explicit Grid(int32_t count) : gate(count * fastmp::kThreads + 1), blocks(count) {
    for (int32_t b = 0; b < count; ++b) {
      for (int32_t t = 0; t < fastmp::kThreads; ++t) {
        std::thread([this, b, t] {
          fastmp::here = {t, b, static_cast<int32_t>(blocks.size()), 1, &blocks[b]};
          for (;;) {
            gate.arrive_and_wait();
            if (fastmp::serves(fastmp::Sharing(), *args)) {
              fastmp::launch(fastmp::Sharing(), *args);
            } else {
              fastmp::launch(fastmp::Every(), *args);
            }
            gate.arrive_and_wait();
          }
        }).detach();
      }
    }
  }
  std::barrier<> gate;
  std::vector<fastmp::Block> blocks;
  const fastmp_step_args* args = nullptr;
};

extern "C" void shim_update(int32_t blocks, const fastmp_step_args* args) {
  static std::map<int32_t, Grid*> grids;
  Grid*& grid = grids[blocks];
  if (grid == nullptr) grid = new Grid(blocks);
  grid->args = args;
  grid->gate.arrive_and_wait();
  grid->gate.arrive_and_wait();
}

extern "C" bool shim_has_rule(int32_t number) {
#define FASTMP_NUMBER(Rule) \
  if (number == fastmp::Rule::number) return true;
  FASTMP_RULES(FASTMP_NUMBER)
  return false;
}
