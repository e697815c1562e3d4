/* update: one optimizer step over a table of tensors.
 *
 *   phase 1   found_inf = any gradient not finite;  norm = || grad / scale ||
 *   phase 2   unless found_inf:  g = grad / scale * min(1, max_norm / norm);  rule(master, g);
 *             weight = round(master)
 *   master    where it no longer rounds to the weight: the weight, which was changed from outside
 *
 * Bytes per parameter with Adam and 16-bit weights and gradients: phase 1 reads 2; phase 2 reads
 * the gradient (2), the weight (2), the master (4, split: its remainder 2) and the moments (8) and
 * writes moments, master and weight (14, split 12): 32, split 28. With fp32 weights 4 + 28 = 32.
 * bf16 states save 8 of these, 8-bit ones 11.9; an average adds 8.
 * Phase 2 walks backwards, so the gradients scanned last are still in cache.
 *
 * Every sum has a fixed order that no number of threads changes: vector lanes within a chunk, the
 * lanes in order, then the chunks in order, in fp64. */
#include "../common/rules.h"
#include "../common/step.h"
#include "vec.h"

namespace fastmp {
namespace FASTMP_TARGET {
namespace {

constexpr int64_t kChunk = 16384; /* elements of one row, scanned or updated by one thread */
constexpr int64_t kBlock = 128;   /* elements staged in L1 as fp32: 512 bytes a stream */
typedef int32_t IntVec __attribute__((vector_size(kWidth * sizeof(int32_t))));

/* Which chunks belong to which row: first_chunk[row] <= chunk < first_chunk[row + 1]. */
struct Chunks {
  const fastmp_row* rows;
  int64_t row_count;
  const int64_t* first_chunk;

  int64_t row_of(int64_t chunk) const {
    int64_t low = 0, high = row_count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
  int64_t begin(int64_t row, int64_t chunk) const { return (chunk - first_chunk[row]) * kChunk; }
  int64_t end(int64_t row, int64_t chunk) const {
    return min_of(begin(row, chunk) + kChunk, rows[row].numel);
  }
};

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

/* ---- phase 1 ---- */

struct ChunkScan {
  double sum_of_squares;
  bool not_finite;
};

/* The least normal number: a sum of squares that starts here is never subnormal, and ends where one
 * that starts at 0 does, if it takes up the square of a gradient of kTiny. */
constexpr float kLeastNormal = 1.17549435e-38f;
constexpr float kTiny = 2.84217094e-14f;   /* 2^-45 */
constexpr float kEnlarge = 1.84467441e19f; /* 2^64 */

/* Sums and largest magnitudes by lane; as bits, inf and NaN have the largest magnitudes. */
struct LaneScan {
  Vec sum = broadcast(kLeastNormal);
  IntVec largest = {};

  void add(Vec g, Vec unscale) {
    const IntVec magnitude = (IntVec)g & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
    g *= unscale;
    sum = multiply_add(g, g, sum);
  }
};

struct LanesScanned {
  double sum_of_squares;
  float largest;
};

/* Reads as fast as memory delivers: 57 GB/s of fp32 on two cores that copy at 46. Four streams, a
 * quarter of the chunk each, were slower (41 GB/s). */
template <class T>
LanesScanned scan_lanes(const T* grads, int64_t n, float unscale) {
  constexpr int kStreams = 4; /* independent sums: an addition takes four cycles */
  const Vec factor = broadcast(unscale);
  LaneScan streams[kStreams];
  int64_t i = 0;
  for (; i + kStreams * kWidth <= n; i += kStreams * kWidth) {
    for (int s = 0; s < kStreams; ++s) streams[s].add(load(grads + i + s * kWidth), factor);
  }
  for (; i + kWidth <= n; i += kWidth) streams[0].add(load(grads + i), factor);
  if (i < n) streams[0].add(load_part(grads + i, n - i, 0.0f), factor);
  double sum = 0.0;
  int32_t largest = 0;
  for (const LaneScan& stream : streams) {
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      sum += static_cast<double>(stream.sum[lane]);
      largest = max_of(largest, stream.largest[lane]);
    }
  }
  return {sum, float_from_bits(static_cast<uint32_t>(largest))};
}

/* Gradients below kTiny a second time, enlarged: the square of 1e-20 is subnormal. */
template <class T>
ChunkScan scan_chunk(const T* grads, int64_t n, float unscale) {
  const LanesScanned scan = scan_lanes(grads, n, unscale);
  if (scan.largest == 0.0f) return {0.0, false};
  if (scan.largest * unscale < kTiny && unscale < kEnlarge) {
    const double shrink = 1.0 / static_cast<double>(kEnlarge);
    const double sum = scan_lanes(grads, n, unscale * kEnlarge).sum_of_squares;
    return {sum * shrink * shrink, false};
  }
  return {scan.sum_of_squares, !is_finite(scan.largest)};
}

ChunkScan scan_chunk(const fastmp_row& row, int64_t begin, int64_t end, float unscale) {
  const int64_t n = end - begin;
  switch (row.grad_dtype) {
    case FASTMP_F16:
      return scan_chunk(static_cast<const f16*>(row.grad) + begin, n, unscale);
    case FASTMP_BF16:
      return scan_chunk(static_cast<const bf16*>(row.grad) + begin, n, unscale);
    default:
      return scan_chunk(static_cast<const float*>(row.grad) + begin, n, unscale);
  }
}

struct ScanResult {
  double sum_of_squares;
  int64_t first_nonfinite; /* param_index of the row; -1: every gradient is finite */
};

/* False if there is no memory for the partial results. */
bool scan_gradients(const Chunks& chunks, float unscale, ScanResult* result) {
  const int64_t count = chunks.first_chunk[chunks.row_count];
  Scratch<ChunkScan> scans(count);
  if (scans.data == nullptr) return false;
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    int64_t row = chunks.row_of(begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= chunks.first_chunk[row + 1]) ++row;
      scans.data[chunk] =
          scan_chunk(chunks.rows[row], chunks.begin(row, chunk), chunks.end(row, chunk), unscale);
    }
  });
  *result = {0.0, -1};
  for (int64_t chunk = 0; chunk < count; ++chunk) {
    result->sum_of_squares += scans.data[chunk].sum_of_squares;
    if (scans.data[chunk].not_finite && result->first_nonfinite < 0) {
      result->first_nonfinite = chunks.rows[chunks.row_of(chunk)].param_index;
    }
  }
  return true;
}

/* ---- phase 2 ---- */

/* current_master() on n elements of fp32 masters, in place. */
template <class T>
void update_masters(const T* weight, float* master, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec value = load(weight + i), m = load(master + i);
    T rounded[kWidth];
    save(m, rounded);
    save(load(rounded) == value ? m : value, master + i);
  }
  for (; i < n; ++i) master[i] = current_master(weight[i], master[i]);
}

template <class T>
void join_masters(const T* __restrict weight, const int16_t* __restrict remainder, int64_t n,
                  float* __restrict master) {
  for (int64_t i = 0; i < n; ++i) master[i] = join_master(weight[i], remainder[i]);
}

template <class T>
void split_masters(const float* __restrict master, int64_t n, T* __restrict weight,
                   int16_t* __restrict remainder) {
  for (int64_t i = 0; i < n; ++i) split_master(master[i], &weight[i], &remainder[i]);
}

float* read_master(const fastmp_row& row, int64_t offset, int64_t n, float* buffer) {
  if (row.master_kind == FASTMP_SELF) return static_cast<float*>(row.param) + offset;
  if (row.master_kind == FASTMP_OUTPUT) return buffer;
  if (row.master_kind == FASTMP_FULL) {
    float* master = static_cast<float*>(row.master) + offset;
    if (row.param_dtype == FASTMP_F16) {
      update_masters(static_cast<const f16*>(row.param) + offset, master, n);
    } else {
      update_masters(static_cast<const bf16*>(row.param) + offset, master, n);
    }
    return master;
  }
  const int16_t* remainder = static_cast<const int16_t*>(row.master) + offset;
  if (row.param_dtype == FASTMP_F16) {
    join_masters(static_cast<const f16*>(row.param) + offset, remainder, n, buffer);
  } else {
    join_masters(static_cast<const bf16*>(row.param) + offset, remainder, n, buffer);
  }
  return buffer;
}

void write_weight(const fastmp_row& row, int64_t offset, int64_t n,
                  const float* __restrict master) {
  if (row.master_kind == FASTMP_SELF) return;
  if (row.master_kind == FASTMP_SPLIT) {
    int16_t* remainder = static_cast<int16_t*>(row.master) + offset;
    if (row.param_dtype == FASTMP_F16) {
      split_masters(master, n, static_cast<f16*>(row.param) + offset, remainder);
    } else {
      split_masters(master, n, static_cast<bf16*>(row.param) + offset, remainder);
    }
  } else if (row.param_dtype == FASTMP_F16) {
    narrow(master, static_cast<f16*>(row.param) + offset, n);
  } else {
    narrow(master, static_cast<bf16*>(row.param) + offset, n);
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

/* n values of a state as fp32: in place where they are kept so, else in buffer. */
template <class Kind, Quantity quantity>
float* read_state(const StateItems<Kind>& state, int64_t n, float* __restrict buffer) {
  const typename Kind::Item* __restrict items = state.items;
  if constexpr (Kind::kind == FASTMP_STATE_F32) {
    return state.items;
  } else if constexpr (Kind::block > 0) {
    /* Widened first: GCC would take the width of its vectors from the bytes. */
    alignas(64) uint32_t codes[kBlock];
    for (int64_t i = 0; i < n; ++i) codes[i] = items[i];
    for_each_block(n, [&](int64_t first, int64_t count) {
      const uint32_t scale = state.scales[first / Kind::block];
      for (int64_t i = first; i < first + count; ++i) {
        buffer[i] = Kind::template load<quantity>(codes[i], scale);
      }
    });
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = Kind::template load<quantity>(items[i], 0u);
  }
  return buffer;
}

template <class Kind, Quantity quantity>
void write_state(const StateItems<Kind>& state, int64_t n, const float* __restrict values,
                 const uint32_t* __restrict random, int s) {
  typename Kind::Item* __restrict items = state.items;
  if constexpr (Kind::block > 0) {
    alignas(64) uint32_t codes[kBlock];
    for_each_block(n, [&](int64_t first, int64_t count) {
      uint32_t largest = 0u;
      for (int64_t i = first; i < first + count; ++i) {
        largest = max_of(largest, bits_of(values[i]) & 0x7fffffffu);
      }
      const uint32_t scale = Kind::template scale_of<quantity>(largest);
      state.scales[first / Kind::block] = static_cast<uint8_t>(scale);
      for (int64_t i = first; i < first + count; ++i) {
        codes[i] = Kind::template store<quantity>(values[i], bits_for_state(random[i], s), scale);
      }
    });
    for (int64_t i = 0; i < n; ++i) items[i] = static_cast<uint8_t>(codes[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      items[i] = Kind::template store<quantity>(values[i], bits_for_state(random[i], s), 0u);
    }
  }
}

void move_averages(float* __restrict average, const float* __restrict value, int64_t n,
                   float rate) {
  for (int64_t i = 0; i < n; ++i) average[i] = move_average(average[i], value[i], rate);
}

template <class Rule>
void apply_block(float* __restrict p, const float* __restrict g, float* __restrict s0,
                 float* __restrict s1, float* __restrict s2, int64_t n,
                 const typename Rule::Coefficients& coefficients) {
  const typename Rule::Coefficients k = coefficients; /* a copy: nothing below can alias it */
  for (int64_t i = 0; i < n; ++i) Rule::apply(p[i], g[i], s0[i], s1[i], s2[i], k);
}

/* Arguments of phase 2 that are the same for all rows. */
struct UpdateStep {
  const fastmp_hyper* groups;
  ScheduleRow scheduled;
  float grad_factor; /* unscales and clips */
  const fastmp_request* request;
};

/* The last coefficients of a thread: two powers a chunk were 8% of a step over 1,000 small tensors,
 * most of which share group and step. */
struct CoefficientCache {
  int32_t group = -1;
  float step = -1.0f;
  float coefficients[12];
};

template <class Rule>
typename Rule::Coefficients coefficients_of(const fastmp_row& row, const UpdateStep& step,
                                            CoefficientCache* cache) {
  typename Rule::Coefficients k;
  static_assert(sizeof k <= sizeof cache->coefficients, "a rule with more coefficients");
  if (cache->group == row.group && cache->step == *row.step) {
    memcpy(&k, cache->coefficients, sizeof k);
    return k;
  }
  k = Rule::prepare(apply_schedule(step.groups[row.group], step.scheduled),
                    static_cast<double>(*row.step), step.grad_factor);
  memcpy(cache->coefficients, &k, sizeof k);
  cache->group = row.group;
  cache->step = *row.step;
  return k;
}

/* The elements of one block, with the states and the random bits that round them. */
template <class Rule, class Kind>
struct StateBlock {
  alignas(64) float buffers[3][kBlock]; /* unused where the rule has no such state */
  alignas(64) uint32_t random[kBlock];
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

  template <int s>
  void write(const fastmp_row& row, int64_t offset, int64_t n) {
    if constexpr (s < Rule::states) {
      write_state<Kind, Rule::quantity(s)>(StateItems<Kind>(row, s, offset), n, values[s], random,
                                           s);
    }
  }
  void write(const fastmp_row& row, int64_t offset, int64_t n, const RandomKey& key) {
    if constexpr (Kind::kind == FASTMP_STATE_F32 || Rule::states == 0) return;
    const uint32_t first = static_cast<uint32_t>(offset);
    for (int64_t i = 0; i < n; ++i) random[i] = random_bits(key, first + static_cast<uint32_t>(i));
    write<0>(row, offset, n);
    write<1>(row, offset, n);
    write<2>(row, offset, n);
  }
};

template <class Rule, class Kind>
void update_chunk(const fastmp_row& row, const UpdateStep& step, int64_t begin, int64_t end,
                  CoefficientCache* cache) {
  const auto k = coefficients_of<Rule>(row, step, cache);
  const float rate = ema_rate(*step.request, *row.step);
  const RandomKey key = random_key(step.request->rounding_seed, *row.step, row.param_index, begin);
  alignas(64) float grads[kBlock], masters[kBlock] = {}; /* no rule reads an OUTPUT's */
  StateBlock<Rule, Kind> states;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = min_of(kBlock, end - at);
    float* master = read_master(row, at, n, masters);
    states.read(row, at, n);
    apply_block<Rule>(master, read_grad(row, at, n, grads), states.values[0], states.values[1],
                      states.values[2], n, k);
    states.write(row, at, n, key);
    if (row.average != nullptr) move_averages(row.average + at, master, n, rate);
    write_weight(row, at, n, master);
  }
}

template <class Rule>
void update_chunk(const fastmp_row& row, const UpdateStep& step, int64_t begin, int64_t end,
                  CoefficientCache* cache) {
  switch (row.state_kind) {
#define FASTMP_CASE(Kind)                                   \
  case Kind::kind:                                          \
    update_chunk<Rule, Kind>(row, step, begin, end, cache); \
    break;
    FASTMP_STATE_KINDS(FASTMP_CASE)
#undef FASTMP_CASE
  }
}

void update_chunks(const Chunks& chunks, const UpdateStep& step) {
  parallel_for(chunks.first_chunk[chunks.row_count], 1, [&](int64_t begin, int64_t end) {
    int64_t row = chunks.row_of(end - 1);
    CoefficientCache cache;
    for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
      while (chunk < chunks.first_chunk[row]) --row;
      const fastmp_row& r = chunks.rows[row];
      const int64_t from = chunks.begin(row, chunk), to = chunks.end(row, chunk);
      switch (static_cast<int>(step.groups[r.group].rule)) {
#define FASTMP_CASE(Rule)                          \
  case Rule::number:                               \
    update_chunk<Rule>(r, step, from, to, &cache); \
    break;
        FASTMP_RULES(FASTMP_CASE)
#undef FASTMP_CASE
      }
    }
  });
}

/* ---- the step ---- */

int states_of(const fastmp_hyper& hyper) {
  if (!(hyper.rule >= 0.0 && hyper.rule < 256.0)) return -1; /* NaN, or more than an int holds */
  switch (static_cast<int>(hyper.rule)) {
#define FASTMP_CASE(Rule) \
  case Rule::number:      \
    return Rule::states;
    FASTMP_RULES(FASTMP_CASE)
#undef FASTMP_CASE
    default:
      return -1;
  }
}

bool is_valid(const fastmp_request& request) {
  if (request.record == nullptr) return false;
  if (!is_aligned(8, request.record, request.schedule, request.ema_decays)) return false;
  if (request.schedule != nullptr && request.schedule_rows < 1) return false;
  if (request.ema_decays != nullptr && request.ema_rows < 1) return false;
  if (!is_addressable(24, request.schedule_rows)) return false;
  if (!is_addressable(8, request.ema_rows)) return false;
  return is_aligned(4, request.grad_scale, request.external_found_inf);
}

bool is_valid(const fastmp_update_args& args) {
  if (!is_valid(args.request) || !is_aligned(8, args.rows, args.groups)) return false;
  if (!is_addressable(sizeof(fastmp_row), args.row_count)) return false;
  if (!is_addressable(sizeof(fastmp_hyper), args.group_count)) return false;
  if (args.row_count > 0 && (args.rows == nullptr || args.groups == nullptr)) return false;
  for (int64_t i = 0; i < args.row_count; ++i) {
    const fastmp_row& row = args.rows[i];
    if (row.group >= args.group_count || row.step == nullptr) return false;
    if (!is_addressable(4, row.numel)) return false;
    const int states = states_of(args.groups[row.group]);
    if (states < 0 || row.param_dtype > FASTMP_BF16 || row.grad_dtype > FASTMP_BF16) return false;
    if (row.master_kind > FASTMP_OUTPUT) return false;
    if ((row.master_kind == FASTMP_SELF) != (row.param_dtype == FASTMP_F32)) return false;
    if (row.state_kind > FASTMP_STATE_8BIT) return false;
    const int64_t widths[] = {4, 2, 1}; /* by kind */
    const int64_t width = widths[row.state_kind];
    if (!is_aligned(width, row.state0, row.state1, row.state2)) return false;
    if (!is_aligned(4, row.step, row.average)) return false;
    if (row.average != nullptr && args.request.ema_decays == nullptr) return false;
    if (!is_aligned(bytes_of(row.param_dtype), row.param)) return false;
    if (!is_aligned(bytes_of(row.grad_dtype), row.grad)) return false;
    if (!is_aligned(row.master_kind == FASTMP_SPLIT ? 2 : 4, row.master)) return false;
    if (row.numel == 0) continue;
    if (row.param == nullptr || row.grad == nullptr) return false;
    const bool has_master = row.master_kind == FASTMP_FULL || row.master_kind == FASTMP_SPLIT;
    if (has_master && row.master == nullptr) return false;
    if (row.state_kind == FASTMP_STATE_8BIT && states > 0 && row.scales == nullptr) return false;
    const void* state[3] = {row.state0, row.state1, row.state2};
    for (int s = 0; s < states; ++s) {
      if (state[s] == nullptr) return false;
    }
  }
  return true;
}

}  // namespace

int update(const fastmp_update_args* args) {
  if (!is_valid(*args)) return FASTMP_BAD_ARGUMENT;
  Scratch<int64_t> first_chunk(args->row_count + 1);
  if (first_chunk.data == nullptr) return FASTMP_NO_MEMORY;
  first_chunk.data[0] = 0;
  for (int64_t i = 0; i < args->row_count; ++i) {
    first_chunk.data[i + 1] = first_chunk.data[i] + ceil_div(args->rows[i].numel, kChunk);
  }
  const Chunks chunks = {args->rows, args->row_count, first_chunk.data};
  const fastmp_request& request = args->request;
  const Unscaling unscaling = unscaling_of(request);
  const ScheduleRow scheduled = schedule_row(request);
  StepDecision decision = unchecked_decision(unscaling);
  if (request.continues != 0) {
    decision = continued_decision(request);
  } else if (needs_scan(request, scheduled)) {
    ScanResult scan;
    if (!scan_gradients(chunks, unscaling.factor, &scan)) return FASTMP_NO_MEMORY;
    decision = decide(request, unscaling, scheduled, scan.sum_of_squares, scan.first_nonfinite);
  }
  if (!decision.skip) {
    for (int64_t i = 0; i < args->row_count && request.continues == 0; ++i) {
      *args->rows[i].step += 1.0f;
    }
    update_chunks(chunks, {args->groups, scheduled, decision.grad_factor, &request});
  }
  if (request.continues == 0) commit_step(request, decision);
  return FASTMP_OK;
}

}  // namespace FASTMP_TARGET
}  // namespace fastmp
