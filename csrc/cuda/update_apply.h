/* Phase 2 of the step, its general path: the rule on elements of a row, with their masters, states
 * and averages, whatever the values and addresses. */
#ifndef FASTMP_UPDATE_APPLY_H
#define FASTMP_UPDATE_APPLY_H

#include "../common/rules.h"
#include "update_chunks.h"

namespace fastmp {

template <class T>
constexpr int kDtype = FASTMP_F32;
template <>
constexpr int kDtype<f16> = FASTMP_F16;
template <>
constexpr int kDtype<bf16> = FASTMP_BF16;

/* Rule, dtypes, master, kind of states and average of a row: the kernel is compiled for the cases
 * of one optimizer. */
template <class Rule_, class Param_, class Grad_, int master_, class State_ = StateF32,
          bool averaged_ = false>
struct Case {
  typedef Rule_ Rule;
  typedef Param_ Param;
  typedef Grad_ Grad;
  typedef State_ State;
  static constexpr int master = master_;
  static constexpr bool averaged = averaged_;

  static __device__ __forceinline__ bool matches(const fastmp_row& row) {
    return row.rule == Rule::number && row.param_dtype == kDtype<Param> &&
           row.grad_dtype == kDtype<Grad> && row.master_kind == master &&
           row.state_kind == State::kind && (row.average != nullptr) == averaged;
  }
};

/* The tensors of a row, in the types of its case. */
template <class Case>
struct Tensors {
  typename Case::Param* param;
  const typename Case::Grad* grad;
  float* full;
  int16_t* remainder;
  uint8_t* scales;
  float* average;
  int64_t numel;
  typename Case::State::Item* state[3];

  static __device__ __forceinline__ Tensors of(const fastmp_row& row, const void* grad) {
    typedef typename Case::State::Item Item;
    return {static_cast<typename Case::Param*>(row.param),
            static_cast<const typename Case::Grad*>(grad),
            static_cast<float*>(Case::master == FASTMP_SELF ? row.param : row.master),
            static_cast<int16_t*>(row.master),
            row.scales,
            row.average,
            row.numel,
            {static_cast<Item*>(row.state0), static_cast<Item*>(row.state1),
             static_cast<Item*>(row.state2)}};
  }

  /* For accesses of n elements. */
  template <int n>
  __device__ __forceinline__ bool are_aligned() const {
    bool aligned = is_aligned<n>(param) && is_aligned<n>(grad);
    if (Case::master == FASTMP_FULL) aligned = aligned && is_aligned<n>(full);
    if (Case::master == FASTMP_SPLIT) aligned = aligned && is_aligned<n>(remainder);
    if (Case::averaged) aligned = aligned && is_aligned<n>(average);
    for (int s = 0; s < Case::Rule::states; ++s) aligned = aligned && is_aligned<n>(state[s]);
    return aligned;
  }
};

/* The numbers of a row at a step. */
template <class Case>
struct RowStep {
  const typename Case::Rule::Coefficients& coefficients;
  float rate; /* ema_rate() */
  RandomKey key;
};

/* n elements of a row from `first` on, each tensor in one access. */
template <int n>
struct Whole {
  static constexpr int size = n;
  int64_t first;

  static constexpr int count = n;
  template <class T>
  __device__ __forceinline__ void read(const T* from, T (&to)[n]) const {
    fastmp::read(from + first, to);
  }
  template <class T>
  __device__ __forceinline__ void write(const T (&from)[n], T* to) const {
    fastmp::write(from, to + first);
  }
};

/* Up to n elements one by one, perhaps none; in place of the others zeros. */
template <int n>
struct Guarded {
  static constexpr int size = n;
  int64_t first;
  int count;

  template <class T>
  __device__ __forceinline__ void read(const T* from, T (&to)[n]) const {
    for (int e = 0; e < n; ++e) to[e] = e < count ? load(from + first + e) : T{};
  }
  template <class T>
  __device__ __forceinline__ void write(const T (&from)[n], T* to) const {
    for (int e = 0; e < n; ++e) {
      if (e < count) store_bits(from[e], to + first + e);
    }
  }
};

/* The scale of state s in the block of an element. */
template <int s, class Case>
FASTMP_DEVICE uint8_t* scale_at(const Tensors<Case>& at, int64_t i) {
  constexpr int block = Case::State::block;
  return at.scales + s * ((at.numel + block - 1) / block) + i / block;
}

template <int s, class Case, class Span, int n>
FASTMP_DEVICE void read_state(const Tensors<Case>& at, const Span& span, float (&values)[n]) {
  if constexpr (s < Case::Rule::states) {
    constexpr Quantity quantity = Case::Rule::quantity(s);
    typename Case::State::Item items[n];
    span.read(at.state[s], items);
    if constexpr (Case::State::block > 0) {
      const uint32_t scale = span.count > 0 ? load(scale_at<s>(at, span.first)) : 0u;
      for (int e = 0; e < n; ++e) {
        /* To bit 19 from its place in a word of four: the other bytes may come along. */
        const uint32_t word = word_of(items, e / 4);
        const uint32_t code = e % 4 == 3 ? word >> 5 : word << (19 - 8 * (e % 4));
        values[e] = Case::State::template load<quantity>(code, scale);
      }
    } else {
      for (int e = 0; e < n; ++e) values[e] = Case::State::template load<quantity>(items[e], 0u);
    }
  }
}

/* The random bits of n elements from `first` on: one, or whole groups. */
template <int n>
FASTMP_DEVICE void draw(const RandomKey& key, int64_t first, uint32_t (&random)[n]) {
  for (int e = 0; e < n; ++e) {
    const int64_t group = first / kRandomGroup + e / kRandomGroup;
    const uint32_t hash = random_hash(key, static_cast<uint32_t>(group));
    random[e] = random_word(hash, n == 1 ? first : e);
  }
}

FASTMP_DEVICE uint32_t max_in_group(uint32_t value) {
  for (int offset = kGroup / 2; offset > 0; offset /= 2) {
    value = max_of(value, shuffle_in_group(value, offset));
  }
  return value;
}

/* A block with one scale is 4 threads with 8 elements each, which agree on its largest value. */
template <int s, class Case, class Span, int n>
FASTMP_DEVICE void write_state(const Tensors<Case>& at, const Span& span, const float (&values)[n],
                               const RandomKey& key) {
  if constexpr (s < Case::Rule::states) {
    typedef typename Case::State State;
    constexpr Quantity quantity = Case::Rule::quantity(s);
    typename State::Item items[n];
    uint32_t random[n] = {};
    if constexpr (State::kind != FASTMP_STATE_F32) draw(key, span.first, random);
    if constexpr (State::block > 0) {
      static_assert(State::block == kGroup * n, "a group of threads has one block");
      uint32_t largest = 0u;
      for (int e = 0; e < n; ++e) {
        const uint32_t magnitude = bits_of(values[e]) & 0x7fffffffu;
        if (e < span.count) largest = max_of(largest, magnitude);
      }
      largest = max_in_group(largest);
      const uint32_t scale = State::template scale_of<quantity>(largest);
      const uint32_t most = State::template most_of<quantity>(scale);
      if (span.count > 0 && span.first % State::block == 0) {
        store_bits(static_cast<uint8_t>(scale), scale_at<s>(at, span.first));
      }
      for (int e = 0; e < n; ++e) {
        const uint32_t bits = bits_for_state<State::dropped>(random[e], s);
        items[e] =
            static_cast<uint8_t>(State::template store<quantity>(values[e], bits, scale, most));
      }
    } else {
      for (int e = 0; e < n; ++e) {
        const uint32_t bits = bits_for_state<State::dropped>(random[e], s);
        items[e] = State::template store<quantity>(values[e], bits, 0u);
      }
    }
    span.write(items, at.state[s]);
  }
}

template <class Case, class Span, int n>
FASTMP_DEVICE void read_masters(const Tensors<Case>& at, const Span& span, float (&masters)[n]) {
  typename Case::Param weights[n];
  constexpr bool is_output = Case::master == FASTMP_OUTPUT;
  if constexpr (Case::master != FASTMP_SELF && !is_output) span.read(at.param, weights);
  if constexpr (Case::master == FASTMP_SPLIT) {
    int16_t remainders[n];
    span.read(at.remainder, remainders);
    for (int e = 0; e < n; ++e) masters[e] = join_master(weights[e], remainders[e]);
  } else if constexpr (!is_output) {
    span.read(at.full, masters);
  }
  if constexpr (Case::master == FASTMP_FULL) {
    for (int e = 0; e < n; ++e) masters[e] = current_master(weights[e], masters[e]);
  }
}

template <class Case, class Span, int n>
FASTMP_DEVICE void write_masters(const Tensors<Case>& at, const Span& span,
                                 const float (&masters)[n]) {
  typename Case::Param weights[n];
  if constexpr (Case::master == FASTMP_SPLIT) {
    int16_t remainders[n];
    for (int e = 0; e < n; ++e) split_master(masters[e], &weights[e], &remainders[e]);
    span.write(remainders, at.remainder);
  } else if constexpr (Case::master != FASTMP_OUTPUT) {
    span.write(masters, at.full);
  }
  if constexpr (Case::master == FASTMP_FULL || Case::master == FASTMP_OUTPUT) {
    for (int e = 0; e < n; ++e) store(masters[e], &weights[e]);
  }
  if constexpr (Case::master != FASTMP_SELF) span.write(weights, at.param);
}

template <class Case, class Span>
FASTMP_DEVICE void update_at(const Tensors<Case>& at, const Span& span, const RowStep<Case>& step) {
  constexpr int n = Span::size;
  typename Case::Grad grads[n];
  float masters[n], states[3][n];
  span.read(at.grad, grads);
  read_masters(at, span, masters);
  read_state<0>(at, span, states[0]);
  read_state<1>(at, span, states[1]);
  read_state<2>(at, span, states[2]);
  Ieee arithmetic;
  for (int e = 0; e < n; ++e) {
    Case::Rule::apply(masters[e], to_float(grads[e]), states[0][e], states[1][e], states[2][e],
                      step.coefficients, arithmetic);
  }
  if constexpr (Case::averaged) {
    float averages[n];
    span.read(at.average, averages);
    for (int e = 0; e < n; ++e) averages[e] = move_average(averages[e], masters[e], step.rate);
    span.write(averages, at.average);
  }
  write_masters(at, span, masters);
  write_state<0>(at, span, states[0], step.key);
  write_state<1>(at, span, states[1], step.key);
  write_state<2>(at, span, states[2], step.key);
}

}  // namespace fastmp
#endif
