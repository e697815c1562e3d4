/* linear: y = act(x Wᵀ + b) and the passes of its backward.
 *
 * gemm                 C = act(A B + b), bias and activation applied to a tile of sums while it is
 *                      in the first-level cache; the sums before act are written only on request.
 *                      Serves y, dx = dz W and dW = dzᵀ x alike.
 * activation           y = act(z): reads z and writes y, 4 bytes of 16-bit values.
 * activation_backward  dz = dy act'(z) and db = Σ dz: reads dy and z, writes dz, 6 bytes of 16-bit
 *                      values; without an activation reads only dy, 2 bytes. */
#include "activation_table.h"
#include "gemm.h"
#include "pages.h"

namespace fastmp {
namespace FASTMP_TARGET {

namespace {

/* ---- gemm ---- */

/* From the finished sums of a tile to its elements of C. */
template <class T, class Act>
struct Finish {
  const fastmp_gemm_args& args;
  void operator()(const float* tile, const Part& part) const {
    for (int64_t row = part.row; row < part.row_end; ++row, tile += kTileN) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < kTileN; j += kWidth) {
        const int64_t lanes = part.column_end - part.column - j;
        if (lanes > 0) finish(load(tile + j), row, part.column + j, lanes);
      }
    }
  }
  void finish(Vec sum, int64_t row, int64_t column, int64_t lanes) const {
    const int64_t at = row * args.n + column;
    if (args.bias != nullptr) {
      sum += load_lanes(static_cast<const T*>(args.bias) + column, lanes);
    }
    if (args.preactivation != nullptr) {
      save_lanes(sum, static_cast<T*>(args.preactivation) + at, lanes);
    }
    save_lanes(Act::value(sum), static_cast<T*>(args.out) + at, lanes);
  }
};

/* C cut into m x n parts of whole tiles, one a thread. */
struct Grid {
  int64_t m, n;
};

/* The grid whose largest part takes the fewest cycles, by the cost of one step of k: multiply-adds
 * of a vector at one a cycle, packing at a third of a cycle an element. */
Grid choose_grid(int64_t m, int64_t n, int64_t k, int64_t threads) {
  constexpr double kWorthThreads = 1 << 16; /* multiply-adds of vectors: about 20 us */
  if (static_cast<double>(m) * n * k < kWorthThreads * kWidth) return {1, 1};
  const auto largest_part = [](int64_t size, int64_t tile, int64_t parts) {
    return static_cast<double>(ceil_div(ceil_div(size, tile), parts) * tile);
  };
  Grid best = {1, 1};
  double fewest = 0;
  for (int64_t parts = 1; parts <= threads; ++parts) {
    const Grid grid = {parts, threads / parts};
    const double height = largest_part(m, kTileM, grid.m), width = largest_part(n, kTileN, grid.n);
    const double cycles = height * width / kWidth + (height + width) / 3;
    if (parts == 1 || cycles < fewest) {
      fewest = cycles;
      best = grid;
    }
  }
  return best;
}

/* Where part i of `parts` begins: a multiple of tile, or size. */
int64_t partition_begin(int64_t size, int64_t tile, int64_t i, int64_t parts) {
  return min_of(ceil_div(size, tile) * i / parts * tile, size);
}

template <class T, class Act>
int gemm_as(const fastmp_gemm_args& args) {
  const int64_t any = args.k > 0; /* k = 0: a and b may be null, and no offset is added to null */
  const Operand<T> a = {static_cast<const T*>(args.a), args.a_stride * any, args.a_k_stride * any};
  const Operand<T> b = {static_cast<const T*>(args.b), args.b_stride * any, args.b_k_stride * any};
  const Grid grid = choose_grid(args.m, args.n, args.k, args.threads);
  const int64_t bytes = args.m * args.n * static_cast<int64_t>(sizeof(T));
  hint_huge_pages(args.out, bytes);
  if (args.preactivation != nullptr) hint_huge_pages(args.preactivation, bytes);
  bool failed = false; /* set, never cleared: a race changes nothing */
  parallel_for(grid.m * grid.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / grid.n, c = i % grid.n;
      const Part part = {partition_begin(args.m, kTileM, r, grid.m),
                         partition_begin(args.m, kTileM, r + 1, grid.m),
                         partition_begin(args.n, kTileN, c, grid.n),
                         partition_begin(args.n, kTileN, c + 1, grid.n)};
      if (!multiply_part(a, b, args.k, part, Finish<T, Act>{args})) {
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      }
    }
  });
  return failed ? FASTMP_NO_MEMORY : FASTMP_OK;
}

bool is_activation(int32_t activation) {
  return activation >= FASTMP_IDENTITY && activation <= FASTMP_SILU;
}

/* Calls body with a value of the type of dtype and an object of the activation's type. */
template <class Body>
int with_types(int32_t dtype, int32_t activation, const Body& body) {
  return with_float_type(dtype, [&](auto value) {
    switch (activation) {
      case FASTMP_RELU:
        return body(value, Relu());
      case FASTMP_GELU:
        return body(value, Gelu());
      case FASTMP_GELU_TANH:
        return body(value, GeluTanh());
      case FASTMP_SILU:
        return body(value, Silu());
      default:
        return body(value, Identity());
    }
  });
}

bool is_valid(const fastmp_gemm_args& args) {
  if (args.threads < 1 || !is_float(args.dtype) || !is_activation(args.activation)) return false;
  if (!is_addressable(4, args.m, args.n)) return false;
  if (!is_addressable(4, args.m, args.k) || !is_addressable(4, args.k, args.n)) return false;
  if (!is_addressable(4, args.m, args.a_stride)) return false;
  if (!is_addressable(4, args.k, args.a_k_stride)) return false;
  if (!is_addressable(4, args.n, args.b_stride)) return false;
  if (!is_addressable(4, args.k, args.b_k_stride)) return false;
  if (args.a_stride != 1 && args.a_k_stride != 1) return false;
  if (args.b_stride != 1 && args.b_k_stride != 1) return false;
  const int64_t width = bytes_of(args.dtype);
  if (!is_aligned(width, args.a, args.b, args.bias, args.preactivation, args.out)) return false;
  if (args.m == 0 || args.n == 0) return true;
  return args.out != nullptr && (args.k == 0 || (args.a != nullptr && args.b != nullptr));
}

/* ---- activation, forward and backward, of a dense matrix ---- */

template <class T, class Act>
int activate_as(const fastmp_activation_args& args) {
  constexpr int64_t kGrain = 32768;
  const T* z = static_cast<const T*>(args.saved);
  T* y = static_cast<T*>(args.out);
  const int64_t n = args.rows * args.columns;
  if (y != z) hint_huge_pages(y, n * static_cast<int64_t>(sizeof(T)));
  if constexpr (kHasTable<T, Act>) {
    if (const T* table = value_table<T, Act>(n)) {
      parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
        look_up_range(table, z + begin, y + begin, end - begin);
      });
      return FASTMP_OK;
    }
  }
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWidth) {
      save_lanes(Act::value(load_lanes(z + i, end - i)), y + i, end - i);
    }
  });
  return FASTMP_OK;
}

/* grad act'(saved) of a vector; table: of act', or null. */
template <class T, class Act>
Vec gradient(const float* table, Vec grad, const T* saved, int64_t lanes) {
  if constexpr (kHasTable<T, Act>) {
    if (table != nullptr && lanes >= kWidth) return grad * look_up(table, saved);
  }
  return Act::gradient(grad, load_lanes(saved, lanes));
}

/* kCount rows from `row` on; their dz is added up in pairs and then to the sums of the columns: a
 * fourth of the passes over these, and a fourth of the rounding errors. */
template <class T, class Act, int64_t kCount>
void backward_rows(const fastmp_activation_args& args, const float* table, int64_t row,
                   float* sums) {
  const int64_t n = args.columns, first = row * n;
  const T* grad = static_cast<const T*>(args.grad_output) + first;
  const bool writes_out = args.out != nullptr;
  const T* saved = writes_out ? static_cast<const T*>(args.saved) + first : nullptr;
  T* out = writes_out ? static_cast<T*>(args.out) + first : nullptr;
  for (int64_t i = 0; i < n; i += kWidth) {
    Vec dz[kCount];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kCount; ++r) {
      const int64_t at = r * n + i;
      dz[r] = load_lanes(grad + at, n - i);
      if (writes_out) {
        dz[r] = gradient<T, Act>(table, dz[r], saved + at, n - i);
        save_lanes(dz[r], out + at, n - i);
      }
    }
    const Vec sum = kCount == 4 ? (dz[0] + dz[1]) + (dz[kCount - 2] + dz[kCount - 1]) : dz[0];
    save_lanes(load_lanes(sums + i, n - i) + sum, sums + i, n - i);
  }
}

/* grad_bias = the sum of `blocks` rows of sums, in fp64: there may be hundreds. */
template <class T>
void sum_blocks(const float* sums, int64_t blocks, int64_t n, T* grad_bias) {
  constexpr int64_t kColumns = 64;
  for (int64_t i = 0; i < n; i += kColumns) {
    const int64_t columns = min_of(kColumns, n - i);
    double totals[kColumns] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t j = 0; j < columns; ++j) totals[j] += sums[b * n + i + j];
    }
    for (int64_t j = 0; j < columns; ++j) store(static_cast<float>(totals[j]), &grad_bias[i + j]);
  }
}

/* Blocks of rows of a fixed size, summed one by one and then in order: the sum does not depend on
 * the number of threads, and no chain of sums in fp32 is longer than 32. */
template <class T, class Act>
int backward_as(const fastmp_activation_args& args) {
  constexpr int64_t kElements = 65536, kMaxRows = 128; /* of a block; worth a thread: 25 us */
  const int64_t n = args.columns;
  if (n == 0) return FASTMP_OK;
  const int64_t block = max_of<int64_t>(1, min_of(kElements / n, kMaxRows));
  const int64_t blocks = ceil_div(args.rows, block);
  Scratch<float> sums(blocks * n);
  if (sums.data == nullptr) return FASTMP_NO_MEMORY;
  hint_huge_pages(args.out, args.rows * n * static_cast<int64_t>(sizeof(T)));
  const float* table = nullptr;
  if constexpr (kHasTable<T, Act>) table = derivative_table<T, Act>(args.rows * n);
  const int64_t grain = max_of<int64_t>(1, kElements / (block * n));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* block_sums = sums.data + i * n;
      memset(block_sums, 0, sizeof(float) * static_cast<size_t>(n));
      const int64_t row_end = min_of((i + 1) * block, args.rows);
      int64_t row = i * block;
      for (; row + 4 <= row_end; row += 4) backward_rows<T, Act, 4>(args, table, row, block_sums);
      for (; row < row_end; ++row) backward_rows<T, Act, 1>(args, table, row, block_sums);
    }
  });
  if (args.grad_bias != nullptr) {
    sum_blocks(sums.data, blocks, n, static_cast<T*>(args.grad_bias));
  }
  return FASTMP_OK;
}

/* The pass over saved and out is there unless a backward only sums grad_output. */
bool is_valid(const fastmp_activation_args& args, bool has_pass) {
  if (!is_float(args.dtype) || !is_activation(args.activation)) return false;
  if (!is_addressable(4, args.rows, args.columns)) return false;
  const int64_t width = bytes_of(args.dtype);
  if (!is_aligned(width, args.saved, args.grad_output, args.out, args.grad_bias)) return false;
  if (args.rows == 0 || args.columns == 0) return true;
  return !has_pass || (args.saved != nullptr && args.out != nullptr);
}

}  // namespace

int gemm(const fastmp_gemm_args* args) {
  if (!is_valid(*args)) return FASTMP_BAD_ARGUMENT;
  if (args->m == 0 || args->n == 0) return FASTMP_OK;
  return with_types(args->dtype, args->activation, [&](auto value, auto act) {
    return gemm_as<decltype(value), decltype(act)>(*args);
  });
}

int activation(const fastmp_activation_args* args) {
  if (!is_valid(*args, true)) return FASTMP_BAD_ARGUMENT;
  return with_types(args->dtype, args->activation, [&](auto value, auto act) {
    return activate_as<decltype(value), decltype(act)>(*args);
  });
}

int activation_backward(const fastmp_activation_args* args) {
  const bool empty = args->rows == 0 || args->columns == 0;
  const bool has_pass = args->activation != FASTMP_IDENTITY || args->out != nullptr;
  if (!is_valid(*args, has_pass)) return FASTMP_BAD_ARGUMENT;
  if (!empty && args->grad_output == nullptr) return FASTMP_BAD_ARGUMENT;
  return with_types(args->dtype, args->activation, [&](auto value, auto act) {
    return backward_as<decltype(value), decltype(act)>(*args);
  });
}

}  // namespace FASTMP_TARGET
}  // namespace fastmp
