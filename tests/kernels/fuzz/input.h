/* The choices of one fuzzed call, from a stream of bytes, and the buffers made for it. */
#ifndef FASTMP_FUZZ_INPUT_H
#define FASTMP_FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

static const int64_t kHuge = INT64_C(1) << 62;
static const int64_t kWidth[4] = {4, 2, 2, 1}; /* bytes of an fp32, fp16, bf16, uint8 */

struct Input {
  const uint8_t* data;
  size_t left;
  void* blocks[64];
  int64_t sizes[64];
  int count;

  Input(const uint8_t* bytes, size_t size) : data(bytes), left(size), count(0) {}
  ~Input() {
    for (int i = 0; i < count; ++i) free(blocks[i]);
  }

  uint8_t byte() {
    if (left == 0) return 0;
    --left;
    return *data++;
  }
  bool one_in(int n) { return byte() % n == n - 1; }
  int64_t below(int64_t n) { return byte() % n; }
  int64_t extent(int64_t most) {
    if (one_in(40)) return one_in(2) ? -1 - below(100) : kHuge;
    return below(most + 1);
  }
  int32_t code(int32_t known) {
    return one_in(24) ? byte() - 128 : static_cast<int32_t>(below(known));
  }
  float number() {
    static const float special[4] = {1.0f / 0.0f, -1.0f / 0.0f, 0.0f / 0.0f, 3e38f};
    return one_in(12) ? special[below(4)] : static_cast<float>(byte() - 128) / 32.0f;
  }

  /* Memory for `values` of `width` bytes; sometimes null, one byte off, or another field's. */
  void* buffer(int64_t values, int64_t width) {
    if (one_in(40)) return nullptr;
    const bool allocatable = values >= 0 && values < 1 << 20;
    const int64_t bytes = allocatable ? values * width : 0;
    for (int i = 0; i < count && one_in(30); ++i) {
      if (sizes[i] >= bytes) return blocks[i];
    }
    const int64_t off = one_in(40) ? 1 : 0;
    char* made = static_cast<char*>(malloc(static_cast<size_t>(bytes + off)));
    for (int64_t i = 0; i < bytes; ++i) made[off + i] = static_cast<char>(byte());
    blocks[count] = made;
    sizes[count++] = off == 0 ? bytes : 0; /* whole ones are shared */
    return made + off;
  }
  float* floats(int64_t values) {
    float* made = static_cast<float*>(buffer(values, 4));
    if (made != nullptr && reinterpret_cast<uintptr_t>(made) % 4 == 0) {
      for (int64_t i = 0; i < values && values < 1 << 20; ++i) made[i] = number();
    }
    return made;
  }
  int64_t* indices(int64_t values, int64_t known) {
    int64_t* made = static_cast<int64_t*>(buffer(values, 8));
    if (made != nullptr && reinterpret_cast<uintptr_t>(made) % 8 == 0) {
      for (int64_t i = 0; i < values && values < 1 << 20; ++i) {
        made[i] = one_in(60) || known < 1 ? byte() - 100 : below(known);
      }
    }
    return made;
  }
};

static int64_t bytes_of(int32_t dtype) {
  return dtype >= 0 && dtype < 4 ? kWidth[dtype] : 4;
}

static int64_t product(int64_t a, int64_t b) {
  int64_t result;
  return __builtin_mul_overflow(a, b, &result) ? kHuge : result;
}

static int64_t size_field(Input& in, size_t size) {
  return in.one_in(60) ? in.below(64) : static_cast<int64_t>(size);
}

#endif
