/* Fuzzes the C ABI of csrc/fastmp.h: every input gets a status.
 *
 * Each input is a stream of bytes that chooses an entry point and fills in its struct: sizes that
 * are zero, negative or do not fit into memory, pointers that are null, misaligned or shared by two
 * fields, dtypes, rules and targets that do not exist. Buffers have exactly the size that the
 * struct promises, so that AddressSanitizer sees the first stray byte; FASTMP_OK and errors are
 * both fine.
 *
 *     abi RUNS SEED
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../../csrc/fastmp.h"
#include "input.h"
#include "tensors.h"

static int32_t fuzz_update(Input& in) {
  const int64_t groups = in.extent(3), rows = in.extent(4);
  fastmp_hyper hypers[3];
  for (fastmp_hyper& hyper : hypers) {
    double* fields = reinterpret_cast<double*>(&hyper);
    for (size_t i = 0; i < sizeof(hyper) / 8; ++i) fields[i] = static_cast<double>(in.number());
    hyper.rule =
        in.one_in(30) ? static_cast<double>(in.number()) : static_cast<double>(in.below(7));
  }
  fastmp_row table[4];
  memset(table, 0, sizeof(table));
  for (fastmp_row& row : table) {
    const int64_t numel = in.extent(300);
    row.numel = numel;
    row.group = static_cast<uint16_t>(in.code(3));
    row.param_dtype = static_cast<uint8_t>(in.code(3));
    row.grad_dtype = static_cast<uint8_t>(in.code(3));
    const uint8_t kinds[3] = {FASTMP_SELF, FASTMP_FULL, FASTMP_SPLIT};
    row.master_kind = in.one_in(20) ? in.byte() : kinds[row.param_dtype % 3];
    if (in.one_in(5)) row.master_kind = FASTMP_OUTPUT;
    row.param = in.buffer(numel, bytes_of(row.param_dtype));
    row.grad = in.buffer(numel, bytes_of(row.grad_dtype));
    row.master = in.buffer(numel, 4);
    row.state0 = in.floats(numel);
    row.state1 = in.floats(numel);
    row.state2 = in.floats(numel);
    row.average = in.one_in(3) ? in.floats(numel) : nullptr;
    row.state_kind = in.one_in(20) ? in.byte() : static_cast<uint8_t>(in.code(3));
    row.scales = in.one_in(20) ? nullptr : static_cast<uint8_t*>(in.buffer(numel, 3));
    row.step = in.floats(1);
  }
  fastmp_update_args args;
  memset(&args, 0, sizeof(args));
  args.size = size_field(in, sizeof(args));
  args.rows = in.one_in(40) ? nullptr : table;
  args.row_count = rows;
  args.groups = in.one_in(40) ? nullptr : hypers;
  args.group_count = groups;
  fastmp_request& request = args.request;
  if (in.one_in(2)) request.grad_scale = in.floats(1);
  if (in.one_in(3)) request.external_found_inf = in.floats(1);
  request.max_grad_norm = in.one_in(2) ? -1.0 : static_cast<double>(in.number());
  request.skip_nonfinite_check = in.below(2);
  request.continues = in.below(2);
  if (in.one_in(3)) {
    request.schedule_rows = in.extent(3);
    request.schedule = static_cast<double*>(in.buffer(product(request.schedule_rows, 3), 8));
  }
  if (in.one_in(2)) {
    request.ema_rows = in.extent(3);
    request.ema_decays = static_cast<double*>(in.buffer(request.ema_rows, 8));
  }
  request.record = static_cast<fastmp_record*>(in.buffer(1, sizeof(fastmp_record)));
  return fastmp_update(&args);
}

static int32_t fuzz_loss(Input& in) {
  fastmp_loss_args args;
  memset(&args, 0, sizeof(args));
  args.size = size_field(in, sizeof(args));
  args.dtype = in.code(3);
  args.reduction = in.code(3);
  args.rows = in.extent(70);
  args.classes = in.extent(40);
  const int64_t numel = product(args.rows, args.classes);
  const bool padded = in.one_in(3);
  args.row_stride = args.classes + (padded ? in.below(4) : 0);
  args.logits = in.buffer(product(args.rows, args.row_stride), bytes_of(args.dtype));
  args.target_a = in.indices(args.rows, args.classes);
  if (in.one_in(2)) {
    args.target_b = in.indices(args.rows, args.classes);
    args.lam_stride = in.below(2);
    args.lam = in.floats(args.lam_stride == 1 ? args.rows : 1);
  }
  if (in.one_in(3)) args.weight = in.floats(args.classes);
  args.ignore_index = in.one_in(2) ? -100 : in.below(40);
  args.smoothing = in.one_in(2) ? 0.1 : static_cast<double>(in.number());
  args.grad_output_stride = in.below(2);
  args.grad_output = in.floats(args.grad_output_stride == 1 ? args.rows : 1);
  args.loss = in.floats(args.reduction == FASTMP_NONE ? args.rows : 1);
  args.stats = in.floats(product(args.rows, 2));
  args.grad = in.buffer(numel, bytes_of(args.dtype));
  const int32_t status = fastmp_loss_forward(&args);
  return in.one_in(2) ? fastmp_loss_backward(&args) : status;
}

static int32_t fuzz_mix(Input& in) {
  fastmp_mix_args args;
  memset(&args, 0, sizeof(args));
  args.size = size_field(in, sizeof(args));
  args.input_dtype = in.code(4);
  args.output_dtype = in.code(3);
  args.batch = in.extent(5);
  args.channels = in.extent(3);
  args.height = in.extent(9);
  args.width = in.extent(9);
  const int64_t numel =
      product(product(args.batch, args.channels), product(args.height, args.width));
  args.input = in.buffer(numel, bytes_of(args.input_dtype));
  args.output = in.buffer(numel, bytes_of(args.output_dtype));
  if (in.one_in(4) == false) args.index = in.indices(args.batch, args.batch);
  args.lam_stride = in.below(2);
  args.lam = in.floats(args.lam_stride == 1 ? args.batch : 1);
  if (in.one_in(2)) {
    args.box_stride = in.below(2) * 4;
    const int64_t boxes = args.box_stride == 4 ? args.batch : 1;
    int64_t* box = in.indices(product(boxes, 4), 6);
    for (int64_t i = 0; box != nullptr && boxes < 9 && i < boxes; ++i) {
      const bool aligned = reinterpret_cast<uintptr_t>(box) % 8 == 0;
      if (!aligned || in.one_in(8)) break;
      const int64_t sound[4] = {0, in.below(args.height > 0 && args.height < 99 ? args.height : 1),
                                0, in.below(args.width > 0 && args.width < 99 ? args.width : 1)};
      memcpy(box + 4 * i, sound, sizeof(sound));
    }
    args.box = box;
  }
  if (in.one_in(2)) args.scale = in.floats(args.channels);
  if (in.one_in(2)) args.shift = in.floats(args.channels);
  return fastmp_mix(&args);
}

/* A matrix in either order, sometimes with padding or without a stride of 1. */
static void* matrix(Input& in, int64_t rows, int64_t columns, int32_t dtype, int64_t* row_stride,
                    int64_t* column_stride) {
  const bool along_rows = in.one_in(2);
  const int64_t pad = in.one_in(4) ? in.below(5) : 0;
  int64_t* far = along_rows ? row_stride : column_stride;
  int64_t* near = along_rows ? column_stride : row_stride;
  const int64_t inner = along_rows ? columns : rows, outer = along_rows ? rows : columns;
  *near = in.one_in(50) ? 2 : 1;
  *far = product(inner < 0 ? 1 : inner, *near) + pad;
  return in.buffer(product(outer, *far), bytes_of(dtype));
}

static int32_t fuzz_gemm(Input& in) {
  fastmp_gemm_args args;
  memset(&args, 0, sizeof(args));
  args.size = size_field(in, sizeof(args));
  args.dtype = in.code(3);
  args.activation = in.code(5);
  args.m = in.extent(40);
  args.n = in.extent(40);
  args.k = in.extent(40);
  args.a = matrix(in, args.m, args.k, args.dtype, &args.a_stride, &args.a_k_stride);
  args.b = matrix(in, args.n, args.k, args.dtype, &args.b_stride, &args.b_k_stride);
  const int64_t numel = product(args.m, args.n);
  if (in.one_in(2)) args.bias = in.buffer(args.n, bytes_of(args.dtype));
  if (in.one_in(2)) args.preactivation = in.buffer(numel, bytes_of(args.dtype));
  args.out = in.buffer(numel, bytes_of(args.dtype));
  args.threads = in.one_in(30) ? in.below(3) - 1 : 1 + in.below(4);
  return fastmp_gemm(&args);
}

static int32_t fuzz_batched_gemm(Input& in) {
  fastmp_batched_gemm_args args;
  memset(&args, 0, sizeof(args));
  args.size = size_field(in, sizeof(args));
  args.batch = in.extent(4);
  args.m = in.extent(40);
  args.symmetric = in.below(2);
  args.n = args.symmetric && !in.one_in(10) ? args.m : in.extent(40);
  args.k = in.extent(40);
  args.a_batch = product(args.m, args.k);
  args.b_batch = product(args.n, args.k);
  args.a = matrix(in, product(args.batch, args.m), args.k, FASTMP_BF16, &args.a_stride,
                  &args.a_k_stride);
  args.b = matrix(in, product(args.batch, args.n), args.k, FASTMP_BF16, &args.b_stride,
                  &args.b_k_stride);
  if (args.a_k_stride != 1) args.a_stride = 1, args.a_k_stride = args.m;
  if (args.b_k_stride != 1) args.b_stride = 1, args.b_k_stride = args.n;
  const int64_t numel = product(args.batch, product(args.m, args.n));
  if (in.one_in(2)) args.c = in.buffer(numel, 2);
  args.out = in.buffer(numel, 2);
  args.alpha = static_cast<double>(in.number());
  args.beta = static_cast<double>(in.number());
  args.threads = in.one_in(30) ? in.below(3) - 1 : 1 + in.below(4);
  return fastmp_batched_gemm(&args);
}

static int32_t fuzz_activation(Input& in) {
  fastmp_activation_args args;
  memset(&args, 0, sizeof(args));
  args.size = size_field(in, sizeof(args));
  args.dtype = in.code(3);
  args.activation = in.code(5);
  args.rows = in.extent(40);
  args.columns = in.extent(40);
  const int64_t numel = product(args.rows, args.columns);
  args.saved = in.buffer(numel, bytes_of(args.dtype));
  args.grad_output = in.buffer(numel, bytes_of(args.dtype));
  args.out = in.buffer(numel, bytes_of(args.dtype));
  if (in.one_in(2)) args.grad_bias = in.buffer(args.columns, bytes_of(args.dtype));
  return in.one_in(2) ? fastmp_activation(&args) : fastmp_activation_backward(&args);
}

static int64_t statuses[4];

static void fuzz_one(const uint8_t* data, size_t size) {
  int32_t (*const targets[])(Input&) = {fuzz_update,     fuzz_loss,    fuzz_mix,         fuzz_gemm,
                                        fuzz_activation, fuzz_tensors, fuzz_batched_gemm};
  Input in(data, size);
  const int32_t status = targets[in.below(7)](in);
  if (status < FASTMP_OK || status > FASTMP_BAD_TARGET) abort();
  ++statuses[status];
}

int main(int argc, char** argv) {
  const long runs = argc > 1 ? atol(argv[1]) : 100000;
  uint64_t state = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
  static uint8_t bytes[16384];
  for (long run = 0; run < runs; ++run) {
    for (uint8_t& byte : bytes) { /* splitmix64 */
      uint64_t z = (state += UINT64_C(0x9e3779b97f4a7c15));
      z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
      z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
      byte = static_cast<uint8_t>(z >> 56);
    }
    fuzz_one(bytes, sizeof(bytes));
  }
  printf("%ld calls: %lld ok, %lld bad arguments, %lld without memory, %lld bad targets\n", runs,
         static_cast<long long>(statuses[0]), static_cast<long long>(statuses[1]),
         static_cast<long long>(statuses[2]), static_cast<long long>(statuses[3]));
  return statuses[FASTMP_OK] == 0 || statuses[FASTMP_BAD_ARGUMENT] == 0;
}
