/* update: one optimizer step over a table of tensors, in one cooperative launch.
 *
 *   phase 1   found_inf = any gradient not finite;  norm = || grad / scale ||
 *   barrier   across the grid
 *   phase 2   unless found_inf:  g = grad / scale * min(1, max_norm / norm);  rule(master, g);
 *             weight = round(master)
 *   master    where it no longer rounds to the weight: the weight, which was changed from outside
 *   epilogue  of the last block: step counts, record
 *
 * Bytes per parameter with Adam and 16-bit weights and gradients: phase 1 reads 2; phase 2 reads
 * the gradient (2), the weight (2), the master (4, split: its remainder 2) and the moments (8) and
 * writes moments, master and weight (14, split 12): 32, split 28. With fp32 weights 4 + 28 = 32.
 * bf16 states save 8 of these, 8-bit ones 11.9; an average adds 8. The table adds 8 for every
 * chunk.
 *
 * A block has one contiguous range of chunks in both phases. It scans it forwards and updates it
 * backwards, so that the gradients scanned last are still in L2. A thread updates 4 elements at a
 * time: 128 bits of every fp32 stream, 64 of every 16-bit one; 1,024 threads a multiprocessor have
 * 56 KB on their way, twice what an H200's bandwidth times its latency asks for (predicted).
 *
 * Measured on an H200, 105 M parameters, of a copy: fp16 90% (30 bytes, without the weight's), bf16
 * 90%, fp32 92%. With streaming hints (.cs) on loads and stores 88, 88 and 90; with ranges of 8
 * chunks in turn instead of one contiguous range a block 86, 87 and 90.
 *
 * The norm has one order of summation on every GPU, whatever its number of multiprocessors: the
 * chunks are divided into at most 2,048 partials, a partial is summed by one block and the partials
 * in order. */
#include "../common/rules.h"
#include "../common/step.h"
#include "device.h"

namespace fastmp {

constexpr int64_t kChunk = FASTMP_CHUNK_SIZE; /* elements; from backends/cuda/nvrtc.py */
constexpr int32_t kNoRow = 0x7fffffff;

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

/* n items in `parts` partitions of equal size, the first n % parts of them larger by one: the first
 * item of a partition. */
FASTMP_DEVICE int32_t partition_begin(int32_t n, int32_t part, int32_t parts) {
  return part * (n / parts) + min_of(part, n % parts);
}

/* Calls body(row, begin, end) on the chunks [first, last), from the last to the first, once for all
 * chunks of one row. */
template <class Body>
FASTMP_DEVICE void for_each_range(const fastmp_step_args& args, int32_t first, int32_t last,
                                  const Body& body) {
  while (last > first) {
    const fastmp_chunk chunk = args.chunks[last - 1];
    const int32_t count = min_of(last - first, chunk.chunk_index + 1);
    const int64_t end = (chunk.chunk_index + int64_t{1}) * kChunk;
    body(chunk.row, end - count * kChunk, min_of(end, args.rows[chunk.row].numel));
    last -= count;
  }
}

struct ScanResult {
  double sum_of_squares;
  int32_t first_nonfinite; /* row; kNoRow: every gradient is finite */
};

/* The shared memory of a block. */
struct Shared {
  ScanResult warps[kThreads / kWarp];
  StepDecision decision;
  alignas(8) unsigned char coefficients[48]; /* of this group at this step */
  int32_t group;
  float step;
  bool is_last;
};

/* ---- memory ---- */

template <class T, int n>
union Packet {
  T items[n];
  typename Access<n * sizeof(T)>::Bits bits;
};

template <int n, class T>
FASTMP_DEVICE bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (n * sizeof(T)) == 0;
}

/* n consecutive elements in one access. */
template <int n, class T>
FASTMP_DEVICE void read(const T* from, T (&to)[n]) {
  Packet<T, n> packet;
  packet.bits = load(reinterpret_cast<const decltype(packet.bits)*>(from));
  for (int i = 0; i < n; ++i) to[i] = packet.items[i];
}

template <int n, class T>
FASTMP_DEVICE void write(const T (&from)[n], T* to) {
  Packet<T, n> packet;
  for (int i = 0; i < n; ++i) packet.items[i] = from[i];
  store_bits(packet.bits, reinterpret_cast<decltype(packet.bits)*>(to));
}

/* ---- phase 1 ---- */

/* Barrier across the grid; writes before it are visible to all blocks after it. All blocks must run
 * at once, which a cooperative launch ensures. The first block adds 2^31 less the number of the
 * others: the top bit flips when all have arrived, whatever the word was. It needs no reset. */
FASTMP_DEVICE void sync_grid(uint32_t* barrier) {
  sync_block();
  if (thread() == 0) {
    const uint32_t others = static_cast<uint32_t>(blocks() - 1);
    const uint32_t before = atomic_add_acq_rel(barrier, block() == 0 ? 0x80000000u - others : 1u);
    while (((load_acquire(barrier) ^ before) & 0x80000000u) == 0u) {
    }
  }
  sync_block();
}

FASTMP_DEVICE ScanResult sum_of(const ScanResult& a, const ScanResult& b) {
  return {a.sum_of_squares + b.sum_of_squares, min_of(a.first_nonfinite, b.first_nonfinite)};
}

/* The sum over the block, for all its threads. */
FASTMP_DEVICE ScanResult sum_over_block(ScanResult mine, Shared& shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    mine = sum_of(mine, {shuffle_down(mine.sum_of_squares, offset),
                         shuffle_down(mine.first_nonfinite, offset)});
  }
  if (thread() % kWarp == 0) shared.warps[thread() / kWarp] = mine;
  sync_block();
  ScanResult all = shared.warps[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) all = sum_of(all, shared.warps[warp]);
  sync_block();
  return all;
}

/* Squares in fp32, 16 bytes of gradients at a time; their sums in fp64. */
struct Squares {
  double sum;
  uint32_t largest; /* magnitude, as bits: inf and NaN are the largest */

  template <int n, class T>
  __device__ __forceinline__ void add(const T* grads, float factor) {
    Packet<T, n> packet;
    packet.bits = read_only(reinterpret_cast<const decltype(packet.bits)*>(grads));
    float squares = 0.0f;
    for (int i = 0; i < n; ++i) {
      const float g = to_float(packet.items[i]);
      const uint32_t magnitude = bits_of(g) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
      squares += (g * factor) * (g * factor);
    }
    sum += static_cast<double>(squares);
  }
};

template <class T>
FASTMP_DEVICE ScanResult scan(const void* gradients, int32_t row, int64_t begin, int64_t end,
                              float factor) {
  constexpr int n = 16 / sizeof(T);
  const T* grads = static_cast<const T*>(gradients);
  const int64_t whole = is_aligned<n>(grads) ? end / n * n : begin;
  Squares squares = {0.0, 0u};
#pragma unroll 4
  for (int64_t i = begin + thread() * n; i < whole; i += kThreads * n) {
    squares.add<n>(grads + i, factor);
  }
#pragma unroll 1
  for (int64_t i = whole + thread(); i < end; i += kThreads) squares.add<1>(grads + i, factor);
  return {squares.sum, squares.largest >= 0x7f800000u ? row : kNoRow};
}

FASTMP_DEVICE ScanResult scan_row(const fastmp_step_args& args, int32_t index, int64_t begin,
                                  int64_t end, float factor) {
  const fastmp_row& row = args.rows[index];
  switch (row.grad_dtype) {
    case FASTMP_F16:
      return scan<f16>(row.grad, index, begin, end, factor);
    case FASTMP_BF16:
      return scan<bf16>(row.grad, index, begin, end, factor);
    default:
      return scan<float>(row.grad, index, begin, end, factor);
  }
}

/* Computes the partials of this block. */
FASTMP_DEVICE void scan_partials(const fastmp_step_args& args, float factor, Shared& shared) {
  const int32_t last = partition_begin(args.partial_count, block() + 1, blocks());
  for (int32_t partial = partition_begin(args.partial_count, block(), blocks()); partial < last;
       ++partial) {
    ScanResult mine = {0.0, kNoRow};
    const int32_t first = partial * args.chunks_per_partial;
    for_each_range(args, first, min_of(first + args.chunks_per_partial, args.chunk_count),
                   [&](int32_t row, int64_t begin, int64_t end) {
                     mine = sum_of(mine, scan_row(args, row, begin, end, factor));
                   });
    const ScanResult all = sum_over_block(mine, shared);
    if (thread() == 0) {
      args.partial_sums[partial] = all.sum_of_squares;
      args.partial_nonfinite_rows[partial] = all.first_nonfinite;
    }
  }
}

/* The sum over all partials, the same in every block. */
FASTMP_DEVICE ScanResult sum_over_partials(const fastmp_step_args& args, Shared& shared) {
  ScanResult mine = {0.0, kNoRow};
  for (int32_t partial = thread(); partial < args.partial_count; partial += kThreads) {
    mine = sum_of(mine, {args.partial_sums[partial], args.partial_nonfinite_rows[partial]});
  }
  return sum_over_block(mine, shared);
}

/* ---- phase 2 ---- */

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

/* ---- the step ---- */

/* Phase 1 and the barrier; every block comes to the same decision. */
FASTMP_DEVICE void scan_and_decide(const fastmp_step_args& args, Shared& shared) {
  const fastmp_request& request = args.request;
  const Unscaling unscaling = unscaling_of(request);
  StepDecision decision = unchecked_decision(unscaling);
  if (request.continues != 0) {
    decision = continued_decision(request);
  } else if (needs_scan(request, schedule_row(request))) {
    scan_partials(args, unscaling.factor, shared);
    sync_grid(&request.record->barrier);
    const ScanResult all = sum_over_partials(args, shared);
    const int32_t row = all.first_nonfinite;
    const int64_t first_nonfinite = row == kNoRow ? -1 : args.rows[row].param_index;
    decision =
        decide(request, unscaling, schedule_row(request), all.sum_of_squares, first_nonfinite);
  }
  if (thread() == 0) {
    shared.decision = decision;
    shared.group = -1;
  }
  sync_block();
}

/* Whether this is the last block to arrive; all others have then read what the epilogue changes. */
FASTMP_DEVICE bool is_last_block(fastmp_record* record, Shared& shared) {
  sync_block();
  if (thread() == 0) {
    shared.is_last = atomic_add_acq_rel(&record->done, 1u) == static_cast<uint32_t>(blocks() - 1);
  }
  sync_block();
  return shared.is_last;
}

/* Blocks on a multiprocessor, which share 65,536 registers: 64 a thread for one case with two
 * fp32 streams beside the weight, the most that fit into them; else 80 (rounding a narrow state
 * takes 10 more) or 128. */
template <class... Cases>
FASTMP_FN constexpr int blocks_for() {
  const bool small =
      ((Cases::Rule::states + Cases::averaged < 3 && Cases::State::kind == FASTMP_STATE_F32) &&
       ...);
  return sizeof...(Cases) > 3 ? 2 : sizeof...(Cases) > 1 || !small ? 3 : 4;
}

template <class... Cases>
FASTMP_KERNEL(kThreads, blocks_for<Cases...>())
update(const fastmp_step_args args) {
  FASTMP_SHARED(Shared, shared);
  scan_and_decide(args, shared);
  if (!shared.decision.skip) update_chunks<Cases...>(args, shared);
  if (!is_last_block(args.request.record, shared)) return;
  const bool counts = args.request.continues == 0;
  if (counts && !shared.decision.skip) {
    for (int32_t i = thread(); i < args.row_count; i += kThreads) *args.rows[i].step += 1.0f;
  }
  if (thread() == 0) {
    if (counts) commit_step(args.request, shared.decision);
    args.request.record->done = 0u;
  }
}

}  // namespace fastmp
