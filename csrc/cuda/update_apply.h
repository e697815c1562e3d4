/* Phase 2 of the step: the rule on every element of a row, with its master, states and average. */
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

/* Prepared by one thread, two powers in fp64, unless the row before had the same group and step, as
 * most have. */
template <class Rule>
FASTMP_DEVICE typename Rule::Coefficients coefficients_of(const fastmp_step_args& args,
                                                          const fastmp_row& row, float step,
                                                          Shared& shared) {
  typedef typename Rule::Coefficients Coefficients;
  static_assert(sizeof(Coefficients) <= sizeof shared.coefficients, "a rule with more of them");
  Coefficients* coefficients = reinterpret_cast<Coefficients*>(shared.coefficients);
  if (row.group != shared.group || step != shared.step) {
    sync_block();
    if (thread() == 0) {
      shared.group = row.group;
      shared.step = step;
      const fastmp_hyper hyper = apply_schedule(args.groups[row.group], schedule_row(args.request));
      *coefficients = Rule::prepare(hyper, static_cast<double>(step), shared.decision.grad_factor);
    }
    sync_block();
  }
  return *coefficients;
}

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

  static __device__ __forceinline__ Tensors of(const fastmp_row& row) {
    typedef typename Case::State::Item Item;
    return {static_cast<typename Case::Param*>(row.param),
            static_cast<const typename Case::Grad*>(row.grad),
            static_cast<float*>(Case::master == FASTMP_SELF ? row.param : row.master),
            static_cast<int16_t*>(row.master),
            row.scales,
            row.average,
            row.numel,
            {static_cast<Item*>(row.state0), static_cast<Item*>(row.state1),
             static_cast<Item*>(row.state2)}};
  }

  __device__ __forceinline__ bool are_aligned() const {
    bool aligned = is_aligned<4>(param) && is_aligned<4>(grad);
    if (Case::master == FASTMP_FULL) aligned = aligned && is_aligned<4>(full);
    if (Case::master == FASTMP_SPLIT) aligned = aligned && is_aligned<4>(remainder);
    if (Case::averaged) aligned = aligned && is_aligned<4>(average);
    for (int s = 0; s < Case::Rule::states; ++s) aligned = aligned && is_aligned<4>(state[s]);
    return aligned;
  }
};

/* The numbers of a row at a step. */
template <class Case>
struct RowStep {
  typename Case::Rule::Coefficients coefficients;
  float rate; /* ema_rate() */
  RandomKey key;

  static __device__ __forceinline__ RowStep of(const fastmp_step_args& args, const fastmp_row& row,
                                               int64_t begin, Shared& shared) {
    /* The epilogue raises the count; that of the first pass has raised it for the second. */
    const float step = *row.step + (Case::Rule::number == MuonRule::number ? 0.0f : 1.0f);
    RowStep made = {coefficients_of<typename Case::Rule>(args, row, step, shared), 1.0f, {}};
    if constexpr (Case::averaged) made.rate = ema_rate(args.request, step);
    if constexpr (Case::State::kind != FASTMP_STATE_F32) {
      made.key = random_key(args.request.rounding_seed, step, row.param_index, begin);
    }
    return made;
  }
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
  int64_t count;

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
    typename Case::State::Item items[n];
    span.read(at.state[s], items);
    uint32_t scale = 0u;
    if constexpr (Case::State::block > 0) scale = load(scale_at<s>(at, span.first));
    for (int e = 0; e < n; ++e) {
      values[e] = Case::State::template load<Case::Rule::quantity(s)>(items[e], scale);
    }
  }
}

/* A block with one scale is 8 threads with 4 elements each, which agree on its largest value. */
template <int s, class Case, class Span, int n>
FASTMP_DEVICE void write_state(const Tensors<Case>& at, const Span& span, const float (&values)[n],
                               const uint32_t (&random)[n]) {
  if constexpr (s < Case::Rule::states) {
    constexpr Quantity quantity = Case::Rule::quantity(s);
    uint32_t scale = 0u;
    if constexpr (Case::State::block > 0) {
      static_assert(Case::State::block == kGroup * n, "a group of threads has one block");
      uint32_t largest = 0u;
      for (int e = 0; e < n; ++e) {
        const uint32_t magnitude = bits_of(values[e]) & 0x7fffffffu;
        if (e < span.count && magnitude > largest) largest = magnitude;
      }
      for (int offset = kGroup / 2; offset > 0; offset /= 2) {
        const uint32_t other = shuffle_in_group(largest, offset);
        largest = other > largest ? other : largest;
      }
      scale = Case::State::template scale_of<quantity>(largest);
      if (span.first % Case::State::block == 0) {
        store_bits(static_cast<uint8_t>(scale), scale_at<s>(at, span.first));
      }
    }
    typename Case::State::Item items[n];
    for (int e = 0; e < n; ++e) {
      items[e] =
          Case::State::template store<quantity>(values[e], bits_for_state(random[e], s), scale);
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
  for (int e = 0; e < n; ++e) {
    Case::Rule::apply(masters[e], to_float(grads[e]), states[0][e], states[1][e], states[2][e],
                      step.coefficients);
  }
  uint32_t random[n] = {};
  if constexpr (Case::State::kind != FASTMP_STATE_F32) {
    for (int e = 0; e < n; ++e) {
      random[e] = random_bits(step.key, static_cast<uint32_t>(span.first + e));
    }
  }
  write_state<0>(at, span, states[0], random);
  write_state<1>(at, span, states[1], random);
  write_state<2>(at, span, states[2], random);
  if constexpr (Case::averaged) {
    float averages[n];
    span.read(at.average, averages);
    for (int e = 0; e < n; ++e) averages[e] = move_average(averages[e], masters[e], step.rate);
    span.write(averages, at.average);
  }
  write_masters(at, span, masters);
}

template <class Case>
FASTMP_DEVICE void update_row(const fastmp_step_args& args, const fastmp_row& row, int64_t begin,
                              int64_t end, Shared& shared) {
  const RowStep<Case> step = RowStep<Case>::of(args, row, begin, shared);
  const Tensors<Case> tensors = Tensors<Case>::of(row);
  const bool aligned = tensors.are_aligned();
  if constexpr (Case::State::block > 0) {
    /* The 8 threads of a block of states go the same way: they meet in a shuffle. */
    constexpr int64_t block = Case::State::block;
#pragma unroll 1
    for (int64_t i = (end + block - 1) / block * block - 4 * (thread() + 1); i >= begin;
         i -= 4 * kThreads) {
      if (aligned && i / block * block + block <= end) {
        update_at(tensors, Whole<4>{i}, step);
      } else {
        update_at(tensors, Guarded<4>{i, end - i}, step);
      }
    }
  } else {
    const int64_t whole = aligned ? end / 4 * 4 : begin;
#pragma unroll 1
    for (int64_t i = whole + thread(); i < end; i += kThreads) {
      update_at(tensors, Whole<1>{i}, step);
    }
#pragma unroll 1
    for (int64_t i = whole - 4 * (thread() + 1); i >= begin; i -= 4 * kThreads) {
      update_at(tensors, Whole<4>{i}, step);
    }
  }
}

template <class... Cases>
FASTMP_DEVICE void update_chunks(const fastmp_step_args& args, Shared& shared) {
  for_each_range(
      args, partition_begin(args.chunk_count, block(), blocks()),
      partition_begin(args.chunk_count, block() + 1, blocks()),
      [&](int32_t index, int64_t begin, int64_t end) {
        const fastmp_row& row = args.rows[index];
        ((Cases::matches(row) ? update_row<Cases>(args, row, begin, end, shared) : void()), ...);
      });
}

}  // namespace fastmp
#endif
