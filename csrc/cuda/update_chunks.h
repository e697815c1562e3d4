/* What both phases of the step share: ranges of chunks, the memory of a block, vector accesses. */
#ifndef FASTMP_UPDATE_CHUNKS_H
#define FASTMP_UPDATE_CHUNKS_H

#include "../common/step.h"
#include "device.h"

namespace fastmp {

constexpr int64_t kChunk = FASTMP_CHUNK_SIZE; /* elements; from backends/cuda/nvrtc.py */
constexpr int32_t kNoRow = 0x7fffffff;

/* n items in `parts` partitions of equal size, the first n % parts of them larger by one: the first
 * item of a partition. */
FASTMP_DEVICE int32_t partition_begin(int32_t n, int32_t part, int32_t parts) {
  return part * (n / parts) + min_of(part, n % parts);
}

/* The kernel's argument, with room for so many words of a step. */
template <int words_>
struct Argument {
  fastmp_step_args head;
  int64_t words[words_];
};

FASTMP_DEVICE int64_t step_word(const fastmp_step_args& args, int32_t index) {
  if (args.step_words != nullptr) return read_only(args.step_words + index);
  return reinterpret_cast<const int64_t*>(&args + 1)[index];
}

FASTMP_DEVICE const void* gradient_of(const fastmp_step_args& args, int32_t row) {
  return reinterpret_cast<const void*>(static_cast<uintptr_t>(step_word(args, row)));
}

FASTMP_DEVICE fastmp_hyper hyper_of(const fastmp_step_args& args, int32_t group) {
  constexpr int32_t count = sizeof(fastmp_hyper) / sizeof(int64_t);
  union {
    int64_t words[count];
    fastmp_hyper hyper;
  } found;
  for (int32_t i = 0; i < count; ++i) {
    found.words[i] = step_word(args, args.row_count + count * group + i);
  }
  return found.hyper;
}

/* Elements of one row. */
struct Range {
  int32_t row;
  int64_t begin, end;
};

FASTMP_DEVICE Range whole_row(const fastmp_step_args& args, int32_t row) {
  return {row, 0, args.rows[row].numel};
}

/* The last chunks of [first, last) that are of one row; `last` is then the first of them. */
FASTMP_DEVICE Range last_range(const fastmp_step_args& args, int32_t first, int32_t& last) {
  const fastmp_chunk chunk = args.chunks[last - 1];
  const int32_t count = min_of(last - first, chunk.chunk_index + 1);
  const int64_t end = (chunk.chunk_index + int64_t{1}) * kChunk;
  last -= count;
  return {chunk.row, end - count * kChunk, min_of(end, args.rows[chunk.row].numel)};
}

struct ScanResult {
  double sum_of_squares;
  int32_t first_nonfinite; /* row; kNoRow: every gradient is finite */
};

/* The part of a block in a range of a row, which it goes through backwards: of each `stride`
 * packets that with the number `first`. */
struct Share {
  int32_t first, stride;
};

/* The shared memory of a block. */
struct Shared {
  ScanResult warps[kThreads / kWarp];
  StepDecision decision;
  alignas(8) unsigned char coefficients[48]; /* of this group at this step */
  Share share;
  int32_t group;
  float step;
  const void* grad; /* of this row */
  bool is_last;
};

template <class T, int n>
union Packet {
  T items[n];
  typename Access<n * sizeof(T)>::Bits bits;
};

/* Four bytes of n. */
template <int n>
FASTMP_DEVICE uint32_t word_of(const uint8_t (&bytes)[n], int index) {
  uint32_t word = 0u;
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(bytes[4 * index + i]) << (8 * i);
  return word;
}

/* Elements of one access when n are read: at most 128 bits. */
template <int n, class T>
constexpr int kPerAccess = n * sizeof(T) > 16 ? 16 / sizeof(T) : n;

template <int n, class T>
FASTMP_DEVICE bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (kPerAccess<n, T> * sizeof(T)) == 0;
}

/* n consecutive elements, in one access or in several of 128 bits. */
template <int n, class T>
FASTMP_DEVICE void read(const T* from, T (&to)[n]) {
  constexpr int m = kPerAccess<n, T>;
  for (int first = 0; first < n; first += m) {
    Packet<T, m> packet;
    packet.bits = load(reinterpret_cast<const decltype(packet.bits)*>(from + first));
    for (int i = 0; i < m; ++i) to[first + i] = packet.items[i];
  }
}

template <int n, class T>
FASTMP_DEVICE void write(const T (&from)[n], T* to) {
  constexpr int m = kPerAccess<n, T>;
  for (int first = 0; first < n; first += m) {
    Packet<T, m> packet;
    for (int i = 0; i < m; ++i) packet.items[i] = from[first + i];
    store_bits(packet.bits, reinterpret_cast<decltype(packet.bits)*>(to + first));
  }
}

}  // namespace fastmp
#endif
