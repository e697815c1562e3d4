/* A block of elements of a row on its way through phase 2: gradient, master and states as fp32, in
 * place where they are kept so, and back. */
#ifndef FASTMP_UPDATE_BLOCK_H
#define FASTMP_UPDATE_BLOCK_H

#include "../common/rules.h"
#include "masters.h"
#include "state_codes.h"
#include "vec.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

/* Elements from the block that is updated to the one whose lines are asked for. */
constexpr int64_t kPrefetch = 512;

template <class T>
FASTMP_FN void prefetch(const void* array, int64_t offset) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const T* first = static_cast<const T*>(array) + offset;
#pragma GCC unroll 8
  for (int64_t i = 0; i < kBlock; i += kLine) __builtin_prefetch(first + i);
}

FASTMP_FN void prefetch(int32_t dtype, const void* array, int64_t offset) {
  dtype == FASTMP_F32 ? prefetch<float>(array, offset) : prefetch<bf16>(array, offset);
}

/* All that a block reads. While a block goes through L1, the processor's own prefetching asks for
 * nothing, and it starts again at every page of 4 KiB. Out of memory, on one core of a Zen 5,
 * it makes steps 1.07x (8 bits beside bf16 weights) to 1.22x (fp32 moments beside those) as fast. A
 * step that is fp32 throughout streams: it gains nothing, and in cache it would lose 15%. */
template <class Rule, class Kind>
FASTMP_FN void prefetch_block(const fastmp_row& row, int64_t offset) {
  if (Kind::kind == FASTMP_STATE_F32 && row.master_kind == FASTMP_SELF) return;
  prefetch(row.param_dtype, row.param, offset);
  prefetch(row.grad_dtype, row.grad, offset);
  if (row.master_kind == FASTMP_FULL) prefetch<float>(row.master, offset);
  if (row.master_kind == FASTMP_SPLIT) prefetch<int16_t>(row.master, offset);
  if constexpr (Rule::states > 0) prefetch<typename Kind::Item>(row.state0, offset);
  if constexpr (Rule::states > 1) prefetch<typename Kind::Item>(row.state1, offset);
  if constexpr (Rule::states > 2) prefetch<typename Kind::Item>(row.state2, offset);
  if (row.average != nullptr) prefetch<float>(row.average, offset);
}

/* n gradients from offset on as fp32: in place where they are fp32 already, else through buffer. */
const float* read_grad(const fastmp_row& row, int64_t offset, int64_t n, float* buffer) {
  switch (row.grad_dtype) {
    case FASTMP_F16:
      widen(static_cast<const f16*>(row.grad) + offset, buffer, n);
      return buffer;
    case FASTMP_BF16:
      widen(static_cast<const bf16*>(row.grad) + offset, buffer, n);
      return buffer;
    default:
      return static_cast<const float*>(row.grad) + offset;
  }
}

/* State s of a row: its items from an offset on, and the scales of their blocks. */
template <class Kind>
struct StateItems {
  typename Kind::Item* items;
  uint8_t* scales;

  StateItems(const fastmp_row& row, int s, int64_t offset) : scales(nullptr) {
    void* const states[3] = {row.state0, row.state1, row.state2};
    items = static_cast<typename Kind::Item*>(states[s]) + offset;
    if constexpr (Kind::block > 0) {
      scales = row.scales + s * ceil_div(row.numel, Kind::block) + offset / Kind::block;
    }
  }
};

/* Calls body(first, count) on n elements in blocks of 8-bit states, whole ones with a constant
 * count. */
template <class Body>
inline void for_each_block(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + State8Bit::block <= n; i += State8Bit::block) body(i, int64_t{State8Bit::block});
  if (i < n) body(i, n - i);
}

/* n values of an 8-bit state. */
template <Quantity quantity>
__attribute__((noinline)) void read_blocks(const StateItems<State8Bit>& state, int64_t n,
                                           float* __restrict values) {
  /* Widened first: GCC would take the width of its vectors from the bytes. */
  alignas(64) uint32_t codes[kBlock];
  for (int64_t i = 0; i < n; ++i) codes[i] = state.items[i];
  for_each_block(n, [&](int64_t first, int64_t count) {
    const uint32_t scale = state.scales[first / State8Bit::block];
    for (int64_t i = first; i < first + count; ++i) {
      values[i] = State8Bit::load<quantity>(codes[i] << State8Bit::dropped, scale);
    }
  });
}

/* n values of a state as fp32: in place where they are kept so, else in buffer. */
template <class Kind, Quantity quantity>
inline float* read_state(const StateItems<Kind>& state, int64_t n, float* buffer) {
  if constexpr (Kind::kind == FASTMP_STATE_F32) {
    return state.items;
  } else if constexpr (Kind::block == 0) {
    widen(state.items, buffer, n);
  } else if (n < kBlock || !read_codes<quantity>(state.items, state.scales, buffer)) {
    read_blocks<quantity>(state, n, buffer);
  }
  return buffer;
}

template <class Kind, Quantity quantity, int s>
__attribute__((noinline)) void write_items(const StateItems<Kind>& state, int64_t n,
                                           const float* __restrict values,
                                           const uint32_t* __restrict random) {
  typename Kind::Item* __restrict items = state.items;
  if constexpr (Kind::block > 0) {
    alignas(64) uint32_t codes[kBlock];
    for_each_block(n, [&](int64_t first, int64_t count) {
      uint32_t largest = 0u;
      for (int64_t i = first; i < first + count; ++i) {
        largest = max_of(largest, bits_of(values[i]) & 0x7fffffffu);
      }
      const uint32_t scale = Kind::template scale_of<quantity>(largest);
      const uint32_t most = Kind::template most_of<quantity>(scale);
      state.scales[first / Kind::block] = static_cast<uint8_t>(scale);
      for (int64_t i = first; i < first + count; ++i) {
        const uint32_t bits = bits_for_state<Kind::dropped>(random[i], s);
        codes[i] = Kind::template store<quantity>(values[i], bits, scale, most);
      }
    });
    for (int64_t i = 0; i < n; ++i) items[i] = static_cast<uint8_t>(codes[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = bits_for_state<Kind::dropped>(random[i], s);
      items[i] = Kind::template store<quantity>(values[i], bits, 0u);
    }
  }
}

template <class Kind, Quantity quantity, int s>
inline void write_state(const StateItems<Kind>& state, int64_t n, const float* values,
                        const uint32_t* random, const BlockScales& scales) {
  if (n == kBlock) {
    if constexpr (Kind::block > 0) {
      if (write_codes<quantity, s>(values, random, scales, state.items, state.scales)) return;
    }
  }
  write_items<Kind, quantity, s>(state, n, values, random);
}

/* The elements of one block, with the states and the random bits that round them. */
template <class Rule, class Kind>
struct StateBlock {
  alignas(64) float buffers[3][kBlock]; /* unused where the rule has no such state */
  alignas(64) uint32_t random[kBlock];
  BlockScales scales[3];
  float* values[3];

  template <int s>
  void read(const fastmp_row& row, int64_t offset, int64_t n) {
    values[s] = buffers[s];
    if constexpr (s < Rule::states) {
      values[s] =
          read_state<Kind, Rule::quantity(s)>(StateItems<Kind>(row, s, offset), n, buffers[s]);
    }
  }
  void read(const fastmp_row& row, int64_t offset, int64_t n) {
    read<0>(row, offset, n);
    read<1>(row, offset, n);
    read<2>(row, offset, n);
  }

  /* Whole blocks of bf16 states: read, updated and written. False where they are not served. */
  bool apply(const fastmp_row& row, int64_t offset, int64_t n, const RandomKey& key, float* master,
             const float* grad, const typename Rule::Coefficients& k) {
    if constexpr (Kind::kind == FASTMP_STATE_BF16 && Rule::states > 0) {
      if (n < kBlock) return false;
      bf16* items[3] = {};
      for (int s = 0; s < Rule::states; ++s) items[s] = StateItems<Kind>(row, s, offset).items;
      random_words(key, static_cast<uint32_t>(offset / kRandomGroup), random);
      return apply_bf16<Rule>(master, grad, items, random, k);
    }
    return false;
  }

  template <int s>
  void find_scales() {
    if constexpr (s < Rule::states) scales[s] = scales_of_blocks<Rule::quantity(s)>(values[s]);
  }
  template <int s>
  void write(const fastmp_row& row, int64_t offset, int64_t n) {
    if constexpr (s < Rule::states) {
      const StateItems<Kind> state(row, s, offset);
      write_state<Kind, Rule::quantity(s), s>(state, n, values[s], random, scales[s]);
    }
  }
  void write(const fastmp_row& row, int64_t offset, int64_t n, const RandomKey& key) {
    if constexpr (Kind::kind != FASTMP_STATE_F32 && Rule::states > 0) {
      if (Kind::block > 0 && n == kBlock) {
        find_scales<0>();
        find_scales<1>();
        find_scales<2>();
      }
      random_words(key, static_cast<uint32_t>(offset / kRandomGroup), random);
      write<0>(row, offset, n);
      write<1>(row, offset, n);
      write<2>(row, offset, n);
    }
  }
};

}  // namespace
}  // namespace FASTMP_TARGET
}  // namespace fastmp
#endif
