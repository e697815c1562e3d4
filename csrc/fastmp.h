/* The C ABI of fastmp's CPU library: pointers, 64-bit sizes and an int status.
 *
 * Every entry point takes one struct. Its first field is the struct's own size, filled in by the
 * caller, so that a caller with another layout is refused instead of misread. The Python mirror of
 * these structs is fastmp/backends/cpu/structs.py. */
#ifndef FASTMP_H
#define FASTMP_H

#include <stdint.h>

#include "common/table.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FASTMP_ABI_VERSION 9

#if defined(__GNUC__)
#define FASTMP_EXPORT __attribute__((visibility("default")))
#else
#define FASTMP_EXPORT
#endif

enum fastmp_status {
  FASTMP_OK = 0,
  FASTMP_BAD_ARGUMENT = 1, /* null, misaligned or overlapping memory, an impossible size, an
                              unknown dtype or rule */
  FASTMP_NO_MEMORY = 2,    /* allocation of scratch memory failed */
  FASTMP_BAD_TARGET = 3,   /* a class index outside [0, classes); see bad_row */
};

/* torch_parallel_for of libtorch_cpu: calls fn(begin, end, ctx) on disjoint ranges. */
typedef void (*fastmp_range_fn)(int64_t begin, int64_t end, void* ctx);
typedef int32_t (*fastmp_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                       fastmp_range_fn fn, void* ctx);

FASTMP_EXPORT int32_t fastmp_abi_version(void);
/* The instruction set of the kernels: "base", "v3" (AVX2), "v4" (AVX-512), "v4bf16". */
FASTMP_EXPORT const char* fastmp_target(void);
/* Sets the thread pool; without one every kernel runs on the calling thread. */
FASTMP_EXPORT void fastmp_set_parallel_for(fastmp_parallel_for pool);

/* ---- update: one optimizer step over a table of tensors (cpu/update.cpp) ---- */
typedef struct {
  int64_t size;
  const fastmp_row* rows;
  int64_t row_count;
  const fastmp_hyper* groups; /* indexed by fastmp_row.group */
  int64_t group_count;
  fastmp_request request;
} fastmp_update_args;
FASTMP_EXPORT int32_t fastmp_update(const fastmp_update_args* args);

/* ---- loss: cross-entropy of a mixed pair of targets with smoothing (cpu/loss.cpp) ---- */
enum fastmp_reduction { FASTMP_NONE = 0, FASTMP_MEAN = 1, FASTMP_SUM = 2 };
typedef struct {
  int64_t size;
  const void* logits; /* rows x classes, the classes of a row side by side */
  int32_t dtype;      /* fastmp_dtype of logits and grad */
  int32_t reduction;  /* fastmp_reduction */
  int64_t rows;
  int64_t classes;
  int64_t row_stride; /* elements from one row of logits to the next */
  const int64_t* target_a;
  const int64_t* target_b; /* NULL: no second target, lam is not read */
  const float* lam;        /* weight of target_a */
  int64_t lam_stride;      /* 0: one lambda for all rows, 1: one per row */
  const float* weight;     /* per class; NULL: all 1 */
  int64_t ignore_index;
  double smoothing;
  const float* grad_output;   /* gradient of the loss; forward: the assumed one, NULL: 1 */
  int64_t grad_output_stride; /* 0: one for all rows, 1: one per row (reduction none) */
  float* loss;                /* forward: 1 value, or one per row for reduction none */
  float* stats;               /* rows x 2: row_max, sum of exp(logit - row_max) without the larger
                                 target; forward writes, backward reads */
  void* grad;         /* gradient of the logits, dense; NULL: forward computes the loss alone */
  int64_t bad_row;    /* out, with FASTMP_BAD_TARGET */
  int64_t bad_target; /* out, likewise */
} fastmp_loss_args;
FASTMP_EXPORT int32_t fastmp_loss_forward(fastmp_loss_args* args);
FASTMP_EXPORT int32_t fastmp_loss_backward(fastmp_loss_args* args);

/* ---- mix: mixup or cutmix with normalisation and cast (cpu/mix.cpp) ---- */
typedef struct {
  int64_t size;
  const void* input;   /* batch x channels x height x width, row-major */
  void* output;        /* same shape */
  int32_t input_dtype; /* fastmp_dtype */
  int32_t output_dtype;
  int64_t batch, channels, height, width;
  const int64_t* index; /* partner of each sample, in [0, batch); NULL: no mixing */
  const float* lam;     /* weight of the sample itself */
  int64_t lam_stride;   /* 0: one for the batch, 1: one per sample */
  const int64_t* box; /* cutmix: (top, bottom, left, right) pasted from the partner; NULL: mixup */
  int64_t box_stride; /* 0: one box for the batch, 4: one per sample */
  const float* scale; /* per channel: normalised = x * scale + shift; NULL: 1 */
  const float* shift; /* per channel; NULL: 0 */
} fastmp_mix_args;
FASTMP_EXPORT int32_t fastmp_mix(const fastmp_mix_args* args);

/* ---- linear: products and activations (cpu/linear.cpp) ---- */
enum fastmp_activation {
  FASTMP_IDENTITY = 0,
  FASTMP_RELU = 1,
  FASTMP_GELU = 2,
  FASTMP_GELU_TANH = 3,
  FASTMP_SILU = 4,
};

/* out = activation(a b + bias): a of m x k, b of k x n. */
typedef struct {
  int64_t size;
  const void* a;
  int64_t a_stride;   /* elements from one row of a to the next */
  int64_t a_k_stride; /* from one column of a to the next; one of the two is 1 */
  const void* b;
  int64_t b_stride;   /* from one column of b to the next */
  int64_t b_k_stride; /* from one row of b to the next; one of the two is 1 */
  int64_t m, n, k;
  int32_t dtype;       /* fastmp_dtype of everything here */
  int32_t activation;  /* fastmp_activation */
  const void* bias;    /* n; NULL: none */
  void* preactivation; /* m x n, dense: a b + bias; NULL: not written */
  void* out;           /* m x n, dense */
  int64_t threads;     /* size of the pool; does not change the result */
} fastmp_gemm_args;
FASTMP_EXPORT int32_t fastmp_gemm(const fastmp_gemm_args* args);

/* out = alpha a b + beta c for every matrix of a batch, bf16: a of m x k, b of k x n (cpu/
 * batched_gemm.cpp). Strides as in fastmp_gemm_args; c and out are dense. */
typedef struct {
  int64_t size;
  const void* a;
  int64_t a_batch; /* elements from one matrix to the next */
  int64_t a_stride, a_k_stride;
  const void* b;
  int64_t b_batch;
  int64_t b_stride, b_k_stride;
  const void* c; /* NULL: none */
  void* out;     /* overlaps none of the others */
  int64_t batch, m, n, k;
  double alpha, beta;
  int64_t symmetric; /* 1: a b and c are, m = n; what lies above the diagonal is not computed */
  int64_t threads;   /* size of the pool; does not change the result */
} fastmp_batched_gemm_args;
FASTMP_EXPORT int32_t fastmp_batched_gemm(const fastmp_batched_gemm_args* args);

/* One pass over dense matrices of rows x columns. Forward: out = activation(saved). Backward: out =
 * grad_output times the derivative, grad_bias its sum over the rows. */
typedef struct {
  int64_t size;
  const void* saved;       /* input of the activation; relu's backward: its output */
  const void* grad_output; /* backward */
  void* out;               /* the backward of FASTMP_IDENTITY takes NULL */
  void* grad_bias;         /* backward, columns; NULL: not written */
  int64_t rows, columns;
  int32_t dtype;
  int32_t activation;
} fastmp_activation_args;
FASTMP_EXPORT int32_t fastmp_activation(const fastmp_activation_args* args);
FASTMP_EXPORT int32_t fastmp_activation_backward(const fastmp_activation_args* args);

/* ---- tensors: gradients and layouts of Python's tensors in one call (cpu/tensors.cpp) ---- */

/* The functions are CPython's for a list, those of torch's stable C ABI (aoti_torch_get_*), and
 * torch's C++ functions that read and raise the version of a tensor. An object holds the address of
 * a tensor's metadata, which is a torch handle; the metadata hold the dispatch keys and the address
 * of what autograd keeps of the tensor, and that the gradient's handle, at offsets that the caller
 * has found out. The caller holds the GIL. */
typedef struct {
  int64_t size;
  const int64_t* lists; /* addresses of Python lists of tensors: the parameters of each group */
  int64_t list_count;
  int64_t handle_offset;   /* bytes, in an object */
  int64_t keys_offset;     /* bytes, in the metadata */
  int64_t autograd_offset; /* bytes, in the metadata; the word is 0 where autograd keeps nothing */
  int64_t grad_offset;     /* bytes, in what autograd keeps */
  int64_t no_grad;         /* that word of a tensor without a gradient */
  const void* list_size;
  const void* list_item;
  const void* get_data_ptr;
  const void* get_dtype;
  const void* get_device_index;
  const void* get_dim;
  const void* get_sizes;
  const void* get_strides;
  const void* get_version;
  const void* raise_version;
  int64_t* layout; /* compared with `words` words of it; write: at most as many are written */
  int64_t words;
  int64_t* addresses; /* out, of the gradients, `address_stride` words apart */
  int64_t address_stride;
  int64_t* handles;    /* out, of the tensors that have a gradient */
  int64_t with_grad;   /* how many they are */
  int64_t version_sum; /* out, over these */
  int32_t write;       /* 1: the layout is an output too, and words the number written */
  int32_t same;        /* out: every word was written or equal, no function of torch failed */
} fastmp_tensors_args;
FASTMP_EXPORT int32_t fastmp_tensors(fastmp_tensors_args* args);

/* Raises the version of the tensors at `handles` by 1: they have been written to. */
FASTMP_EXPORT int32_t fastmp_raise_versions(const fastmp_tensors_args* args);

#ifdef __cplusplus
}
#endif
#endif
