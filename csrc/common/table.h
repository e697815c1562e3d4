/* The multi-tensor table: one layout for the CPU library, the CUDA kernel and Python.
 * Python's mirror is fastmp/backends/abi.py; a test compares the two field by field. */
#ifndef FASTMP_TABLE_H
#define FASTMP_TABLE_H

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#else
#include <stdint.h>
#endif

enum fastmp_dtype { FASTMP_F32 = 0, FASTMP_F16 = 1, FASTMP_BF16 = 2, FASTMP_U8 = 3 };

/* How a parameter keeps its fp32 value. */
enum fastmp_master {
  FASTMP_SELF = 0,   /* fp32 parameter: it is its own master */
  FASTMP_FULL = 1,   /* fp32 tensor beside a 16-bit parameter */
  FASTMP_SPLIT = 2,  /* int16 remainder beside a 16-bit parameter; see numerics.h */
  FASTMP_OUTPUT = 3, /* 16-bit memory that is written, never read: for the next pass of the step */
};

/* How the states of a parameter, its moments, are kept: a struct of state_kinds.h. */
enum fastmp_state_kind { FASTMP_STATE_F32 = 0, FASTMP_STATE_BF16 = 1, FASTMP_STATE_8BIT = 2 };

/* One parameter tensor: flat memory, every tensor of the row in the same element order. Twelve
 * 64-bit words. */
typedef struct {
  void* param;
  const void* grad;
  void* master;    /* fp32 (FULL) or int16 (SPLIT); NULL for SELF */
  void* state0;    /* first moment or momentum */
  void* state1;    /* second moment */
  void* state2;    /* running maximum of the second moment */
  uint8_t* scales; /* 8BIT: states x blocks; else NULL */
  float* average;  /* moving average of the weight; NULL: none is kept */
  float* step;     /* one value: how many updates this tensor has received */
  int64_t numel;
  int64_t param_index; /* among all parameters of the optimizer, with and without gradients */
  uint16_t group;
  uint8_t param_dtype; /* fastmp_dtype */
  uint8_t grad_dtype;
  uint8_t master_kind; /* fastmp_master */
  uint8_t rule;        /* CUDA: that of the group */
  uint8_t state_kind;  /* fastmp_state_kind */
  uint8_t reserved;
} fastmp_row;

/* One parameter group's hyperparameters. All doubles, so that the groups of an optimizer are the
 * rows of one float64 matrix. */
typedef struct {
  double rule;  /* the number of a struct in rules.h */
  double lr;    /* with a schedule: what its lr is multiplied by */
  double beta1; /* SGD: momentum */
  double beta2;
  double eps;
  double weight_decay;
  double dampening;
  double maximize;  /* 1: ascend instead of descend */
  double decoupled; /* 1: decay the weight (AdamW), not the gradient */
  double nesterov;
} fastmp_hyper;

/* The decisions of a step, in the memory of the parameters' device; the host reads them on demand.
 */
typedef struct {
  float found_inf;         /* 1 if the last step was skipped, else 0 */
  float grad_norm;         /* global norm of the unscaled gradients, before clipping */
  int64_t applied;         /* steps that changed the parameters */
  int64_t skipped;         /* steps that did not */
  int64_t first_nonfinite; /* param_index, of the last step that had one; -1: none yet */
  uint32_t barrier;        /* CUDA: arrivals at the grid's barrier; see cuda/update.cu */
  uint32_t done;           /* CUDA: blocks that have finished; 0 between launches */
} fastmp_record;

/* The options of one step. The pointers lead to memory of the parameters' device. */
typedef struct {
  const float* grad_scale;         /* the loss scale the gradients carry; NULL: 1 */
  const float* external_found_inf; /* handed in by a scaler or from other ranks: non-zero skips the
                                      step; NULL: none */
  double max_grad_norm;            /* clip the global norm to this; negative: do not clip */
  int64_t skip_nonfinite_check;    /* 1: no scan unless another option needs one; a non-finite
                                      gradient then reaches the weights */
  const double* schedule; /* rows of (lr, momentum, max_grad_norm) by applied steps, the last one
                             from there on; NaN: unset. NULL: no schedule */
  int64_t schedule_rows;
  const double* ema_decays; /* of the averages, by applied steps, the last one from there on */
  int64_t ema_rows;
  int64_t rounding_seed; /* of the random bits that round 16-bit states */
  int64_t continues; /* 1: second pass of the step that the record describes, of the same schedule
                        row; skipped if that was, neither counted nor recorded. 0: a step */
  fastmp_record* record;
} fastmp_request;

/* CUDA: a chunk of one row, FASTMP_CHUNK_SIZE elements; the last one of a row may be shorter. */
typedef struct {
  int32_t row;
  int32_t chunk_index; /* within its row */
} fastmp_chunk;

/* CUDA: the head of the kernel's argument. Scans are reduced to partials, of consecutive chunks
 * each. The words of a step are what changes from one to the next: the address of every row's
 * gradient, then the groups' fastmp_hyper. They follow the head, and need no copy, if they fit
 * there. */
typedef struct {
  const fastmp_row* rows; /* their `grad` is not read */
  const fastmp_chunk* chunks;
  double* partial_sums;            /* sums of squares */
  int32_t* partial_nonfinite_rows; /* the first row with a non-finite gradient */
  const int64_t* step_words;       /* in device memory; NULL: behind the head */
  int32_t row_count;
  int32_t chunk_count;
  int32_t chunks_per_partial;
  int32_t partial_count;
  fastmp_request request;
} fastmp_step_args;

/* CUDA: the argument of the loss kernels. The pointers lead to device memory. */
typedef struct {
  const void* logits; /* rows x classes, the classes of a row side by side */
  int64_t row_stride; /* elements from one row of logits to the next */
  const int64_t* target_a;
  const int64_t* target_b; /* NULL: one target, and lam is 1 */
  const float* lam;        /* weight of target_a; NULL: lam_value */
  int64_t lam_stride;      /* 0: one lambda for all rows */
  const float* weight;     /* per class; NULL: all 1 */
  const float* weight_total;
  const float* grad_output; /* gradient of the loss; NULL: grad_output_value */
  float* divisor_partials;  /* 2 x 64: of target a, of target b; NULL: the divisors are 1 */
  int32_t* taken;           /* rows that blocks have taken when they were done with others */
  float* loss;              /* one per row */
  float* total;             /* their sum; not written where nothing adds them up */
  float* stats;             /* rows x 2, as in fastmp_loss_args, then both divisors */
  void* grad;               /* rows x classes, dense */
  int64_t ignore_index;
  float target_prob; /* 1-ε */
  float smooth_prob; /* ε/C */
  float lam_value;
  float grad_output_value;
  int32_t rows;
  int32_t classes;
  int32_t slots; /* chunks in the ring: all of a row's */
  int32_t reserved;
} fastmp_ring_args;

#endif
