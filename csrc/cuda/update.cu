/* update: one optimizer step over a table of tensors, in one cooperative launch.
 *
 *   phase 1   found_inf = any gradient not finite;  norm = || grad / scale ||
 *   barrier   across the grid
 *   phase 2   unless found_inf:  g = grad / scale * min(1, max_norm / norm);  rule(master, g);
 *             weight = round(master)
 *   last act  of the block that ends last: step counts, record
 *
 * Bytes per parameter with Adam and 16-bit weights and gradients: phase 1 reads 2; phase 2 reads
 * the gradient (2), the master (4, split: weight 2 + remainder 2) and the moments (8) and writes
 * moments, master and weight (14, split 12): 30, split 28. With fp32 weights 4 + 28 = 32. The table
 * adds 8 for every 1,024 elements.
 *
 * A block has one stretch of the table in both phases. It scans it forwards and updates it
 * backwards, so that the gradients scanned last are still in L2. A thread updates 4 elements at a
 * time: 128 bits of every fp32 stream, 64 of every 16-bit one; 1,024 threads a multiprocessor have
 * 56 KB on their way, twice what an H200's bandwidth times its latency asks for (predicted).
 *
 * The norm has one order of summation on every GPU, whatever its number of multiprocessors: the
 * units are cut into at most 2,048 spans, a span is summed by one block and the spans in order. */
#include "../common/rules.h"
#include "../common/step.h"
#include "device.h"

namespace fastmp {

constexpr int64_t kUnit = 1024; /* elements; fastmp/backends/cuda/update.py counts in them too */
constexpr int32_t kNone = 0x7fffffff;

template <class T>
constexpr int kDtype = FASTMP_F32;
template <>
constexpr int kDtype<f16> = FASTMP_F16;
template <>
constexpr int kDtype<bf16> = FASTMP_BF16;

/* How a row's tensors are kept, and by which rule they change: the kernel is compiled for the cases
 * that an optimizer has. */
template <class Rule_, class Param_, class Grad_, int master_>
struct Case {
  typedef Rule_ Rule;
  typedef Param_ Param;
  typedef Grad_ Grad;
  static constexpr int master = master_;

  static __device__ __forceinline__ bool matches(const fastmp_row& row) {
    return row.rule == Rule::number && row.param_dtype == kDtype<Param> &&
           row.grad_dtype == kDtype<Grad> && row.master_kind == master;
  }
};

template <class T>
FASTMP_DEVICE T smaller(T a, T b) {
  return b < a ? b : a;
}

/* The first of the n things that part `part` of `parts` has: as many as the others, or one more. */
FASTMP_DEVICE int32_t edge(int32_t n, int32_t part, int32_t parts) {
  return part * (n / parts) + smaller(part, n % parts);
}

/* Calls body(number of a row, begin, end) on the units [first, last), from the last to the first,
 * once for all units of one row. */
template <class Body>
FASTMP_DEVICE void for_each_stretch(const fastmp_work& work, int32_t first, int32_t last,
                                    const Body& body) {
  while (last > first) {
    const fastmp_unit unit = work.units[last - 1];
    const int32_t units = smaller(last - first, unit.place + 1);
    const int64_t past = (unit.place + int64_t{1}) * kUnit;
    body(unit.row, past - units * kUnit, smaller(past, work.rows[unit.row].numel));
    last -= units;
  }
}

/* What the threads of a block tell each other. */
struct Scan {
  double sum_of_squares;
  int32_t offender; /* number of the first row with a non-finite gradient, or kNone */
};

struct Shared {
  Scan warps[kThreads / kWarp];
  Verdict verdict;
  alignas(8) unsigned char coefficients[48];
  int32_t group; /* whose the coefficients are, and at which step */
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

/* n elements side by side in one access. */
template <int n, class T>
FASTMP_DEVICE void read(const T* from, T (&to)[n]) {
  Packet<T, n> packet;
  packet.bits = read_past_caches(reinterpret_cast<const decltype(packet.bits)*>(from));
  for (int i = 0; i < n; ++i) to[i] = packet.items[i];
}

template <int n, class T>
FASTMP_DEVICE void write(const T (&from)[n], T* to) {
  Packet<T, n> packet;
  for (int i = 0; i < n; ++i) packet.items[i] = from[i];
  write_past_caches(packet.bits, reinterpret_cast<decltype(packet.bits)*>(to));
}

/* ---- phase 1 ---- */

/* Everything every block wrote before is seen by every block after. All of them must run at once: a
 * cooperative launch sees to it. The first block adds 2^31 less the number of the others, so that
 * the top bit flips when all have come, whatever the word was, and nobody has to reset it. */
FASTMP_DEVICE void sync_grid(uint32_t* barrier) {
  sync_block();
  if (thread() == 0) {
    const uint32_t others = static_cast<uint32_t>(blocks() - 1);
    const uint32_t before = add_in_order(barrier, block() == 0 ? 0x80000000u - others : 1u);
    while (((read_in_order(barrier) ^ before) & 0x80000000u) == 0u) {
    }
  }
  sync_block();
}

FASTMP_DEVICE Scan sum_of(const Scan& a, const Scan& b) {
  return {a.sum_of_squares + b.sum_of_squares, b.offender < a.offender ? b.offender : a.offender};
}

/* The sum over the block, for all its threads. */
FASTMP_DEVICE Scan sum_over_block(Scan mine, Shared& shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    mine = sum_of(mine, {from_lane_after(mine.sum_of_squares, offset),
                         from_lane_after(mine.offender, offset)});
  }
  if (thread() % kWarp == 0) shared.warps[thread() / kWarp] = mine;
  sync_block();
  Scan all = shared.warps[0];
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
FASTMP_DEVICE Scan scan(const void* gradients, int32_t row, int64_t begin, int64_t end,
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
  return {squares.sum, squares.largest >= 0x7f800000u ? row : kNone};
}

FASTMP_DEVICE Scan scan_row(const fastmp_work& work, int32_t number, int64_t begin, int64_t end,
                            float factor) {
  const fastmp_row& row = work.rows[number];
  switch (row.grad_dtype) {
    case FASTMP_F16:
      return scan<f16>(row.grad, number, begin, end, factor);
    case FASTMP_BF16:
      return scan<bf16>(row.grad, number, begin, end, factor);
    default:
      return scan<float>(row.grad, number, begin, end, factor);
  }
}

/* Sums up the spans that are this block's. */
FASTMP_DEVICE void scan_spans(const fastmp_work& work, float factor, Shared& shared) {
  const int32_t last = edge(work.span_count, block() + 1, blocks());
  for (int32_t span = edge(work.span_count, block(), blocks()); span < last; ++span) {
    Scan mine = {0.0, kNone};
    const int32_t first = span * work.units_per_span;
    for_each_stretch(work, first, smaller(first + work.units_per_span, work.unit_count),
                     [&](int32_t row, int64_t begin, int64_t end) {
                       mine = sum_of(mine, scan_row(work, row, begin, end, factor));
                     });
    const Scan all = sum_over_block(mine, shared);
    if (thread() == 0) {
      work.sums[span] = all.sum_of_squares;
      work.offenders[span] = all.offender;
    }
  }
}

/* The sum over all spans, the same in every block. */
FASTMP_DEVICE Scan sum_over_spans(const fastmp_work& work, Shared& shared) {
  Scan mine = {0.0, kNone};
  for (int32_t span = thread(); span < work.span_count; span += kThreads) {
    mine = sum_of(mine, {work.sums[span], work.offenders[span]});
  }
  return sum_over_block(mine, shared);
}

/* ---- phase 2 ---- */

/* One thread prepares them, two powers in fp64, unless the row before had the same group and step:
 * most have. */
template <class Rule>
FASTMP_DEVICE typename Rule::Coefficients coefficients_of(const fastmp_work& work,
                                                          const fastmp_row& row, Shared& shared) {
  typedef typename Rule::Coefficients Coefficients;
  static_assert(sizeof(Coefficients) <= sizeof shared.coefficients, "a rule with more of them");
  Coefficients* coefficients = reinterpret_cast<Coefficients*>(shared.coefficients);
  const float step = *row.step + 1.0f; /* the last act will raise the count */
  if (row.group != shared.group || step != shared.step) {
    sync_block();
    if (thread() == 0) {
      shared.group = row.group;
      shared.step = step;
      const fastmp_hyper hyper = follow(work.groups[row.group], scheduled_by(work.request));
      *coefficients = Rule::prepare(hyper, static_cast<double>(step), shared.verdict.grad_factor);
    }
    sync_block();
  }
  return *coefficients;
}

/* A row's tensors as the case has them. */
template <class Case>
struct Tensors {
  typename Case::Param* param;
  const typename Case::Grad* grad;
  float* full;
  int16_t* remainder;
  float* state[3];

  static __device__ __forceinline__ Tensors of(const fastmp_row& row) {
    return {static_cast<typename Case::Param*>(row.param),
            static_cast<const typename Case::Grad*>(row.grad),
            static_cast<float*>(Case::master == FASTMP_SELF ? row.param : row.master),
            static_cast<int16_t*>(row.master),
            {row.state0, row.state1, row.state2}};
  }

  __device__ __forceinline__ bool are_aligned() const {
    bool aligned = is_aligned<4>(param) && is_aligned<4>(grad);
    if (Case::master == FASTMP_FULL) aligned = aligned && is_aligned<4>(full);
    if (Case::master == FASTMP_SPLIT) aligned = aligned && is_aligned<4>(remainder);
    for (int s = 0; s < Case::Rule::states; ++s) aligned = aligned && is_aligned<4>(state[s]);
    return aligned;
  }
};

template <int n, class Case>
FASTMP_DEVICE void update_at(const Tensors<Case>& at, int64_t i,
                             const typename Case::Rule::Coefficients& k) {
  typename Case::Grad grads[n];
  typename Case::Param weights[n];
  int16_t remainders[n];
  float masters[n], states[3][n];
  read(at.grad + i, grads);
  if constexpr (Case::master == FASTMP_SPLIT) {
    read(at.param + i, weights);
    read(at.remainder + i, remainders);
    for (int e = 0; e < n; ++e) masters[e] = join_master(weights[e], remainders[e]);
  } else {
    read(at.full + i, masters);
  }
  for (int s = 0; s < Case::Rule::states; ++s) read(at.state[s] + i, states[s]);
  for (int e = 0; e < n; ++e) {
    Case::Rule::apply(masters[e], to_float(grads[e]), states[0][e], states[1][e], states[2][e], k);
  }
  for (int s = 0; s < Case::Rule::states; ++s) write(states[s], at.state[s] + i);
  if constexpr (Case::master == FASTMP_SPLIT) {
    for (int e = 0; e < n; ++e) split_master(masters[e], &weights[e], &remainders[e]);
    write(remainders, at.remainder + i);
    write(weights, at.param + i);
  } else {
    write(masters, at.full + i);
    if constexpr (Case::master == FASTMP_FULL) {
      for (int e = 0; e < n; ++e) store(masters[e], &weights[e]);
      write(weights, at.param + i);
    }
  }
}

template <class Case>
FASTMP_DEVICE void update_row(const fastmp_work& work, const fastmp_row& row, int64_t begin,
                              int64_t end, Shared& shared) {
  const auto k = coefficients_of<typename Case::Rule>(work, row, shared);
  const Tensors<Case> tensors = Tensors<Case>::of(row);
  const int64_t whole = tensors.are_aligned() ? end / 4 * 4 : begin;
#pragma unroll 1
  for (int64_t i = whole + thread(); i < end; i += kThreads) update_at<1>(tensors, i, k);
#pragma unroll 1
  for (int64_t i = whole - 4 * (thread() + 1); i >= begin; i -= 4 * kThreads) {
    update_at<4>(tensors, i, k);
  }
}

template <class... Cases>
FASTMP_DEVICE void update_units(const fastmp_work& work, Shared& shared) {
  for_each_stretch(
      work, edge(work.unit_count, block(), blocks()), edge(work.unit_count, block() + 1, blocks()),
      [&](int32_t number, int64_t begin, int64_t end) {
        const fastmp_row& row = work.rows[number];
        ((Cases::matches(row) ? update_row<Cases>(work, row, begin, end, shared) : void()), ...);
      });
}

/* ---- the step ---- */

/* Phase 1, the barrier and the verdict, which every block comes to by itself. */
FASTMP_DEVICE void decide(const fastmp_work& work, Shared& shared) {
  const fastmp_request& request = work.request;
  const Unscaling unscaling = unscaling_of(request);
  Verdict verdict = trust(unscaling);
  if (looks_first(request, scheduled_by(request))) {
    scan_spans(work, unscaling.factor, shared);
    sync_grid(&request.record->barrier);
    const Scan all = sum_over_spans(work, shared);
    const int64_t offender = all.offender == kNone ? -1 : work.rows[all.offender].index;
    verdict = judge(request, unscaling, scheduled_by(request), all.sum_of_squares, offender);
  }
  if (thread() == 0) {
    shared.verdict = verdict;
    shared.group = -1;
  }
  sync_block();
}

/* Whether this is the last block to come here. Then all have read what the last act changes. */
FASTMP_DEVICE bool is_last_block(fastmp_record* record, Shared& shared) {
  sync_block();
  if (thread() == 0) {
    shared.is_last = add_in_order(&record->done, 1u) == static_cast<uint32_t>(blocks() - 1);
  }
  sync_block();
  return shared.is_last;
}

/* A multiprocessor's blocks, which share 65,536 registers: 64 a thread for one case with two
 * states, the most that need no more; else 80 or 128. */
template <class... Cases>
FASTMP_FN constexpr int blocks_for() {
  const bool few_states = ((Cases::Rule::states < 3) && ...);
  return sizeof...(Cases) > 3 ? 2 : sizeof...(Cases) > 1 || !few_states ? 3 : 4;
}

template <class... Cases>
FASTMP_KERNEL(kThreads, blocks_for<Cases...>())
update(const fastmp_work work) {
  FASTMP_SHARED(Shared, shared);
  decide(work, shared);
  if (!shared.verdict.skip) update_units<Cases...>(work, shared);
  if (!is_last_block(work.request.record, shared)) return;
  if (!shared.verdict.skip) {
    for (int32_t i = thread(); i < work.row_count; i += kThreads) *work.rows[i].step += 1.0f;
  }
  if (thread() == 0) {
    conclude(work.request, shared.verdict);
    work.request.record->done = 0u;
  }
}

}  // namespace fastmp
