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
  FASTMP_SELF = 0,  /* fp32 parameter: it is its own master */
  FASTMP_FULL = 1,  /* fp32 tensor beside a 16-bit parameter */
  FASTMP_SPLIT = 2, /* int16 remainder beside a bf16 parameter; together the fp32 bits */
};

/* One parameter tensor: flat memory, every tensor of the row in the same element order. Ten 64-bit
 * words. */
typedef struct {
  void* param;
  const void* grad;
  void* master;  /* fp32 (FULL) or int16 (SPLIT); NULL for SELF */
  float* state0; /* first moment or momentum */
  float* state1; /* second moment */
  float* state2; /* running maximum of the second moment */
  float* step;   /* one value: how many updates this tensor has received */
  int64_t numel;
  int64_t index; /* the parameter's number in the optimizer; what a record calls the offender */
  uint16_t group;
  uint8_t param_dtype; /* fastmp_dtype */
  uint8_t grad_dtype;
  uint8_t master_kind; /* fastmp_master */
  uint8_t rule;        /* CUDA: the number of the group's rule */
  uint8_t reserved[2];
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

/* What a step decided. Lives where the parameters live and is never read on the host in between. */
typedef struct {
  float found_inf;         /* 1 if the last step was skipped, else 0 */
  float grad_norm;         /* global norm of the unscaled gradients, before clipping */
  int64_t applied;         /* steps that changed the parameters */
  int64_t skipped;         /* steps that did not */
  int64_t first_nonfinite; /* index of the first such parameter, kept by later steps; -1: none */
  uint32_t barrier;        /* CUDA: blocks that came to the grid's barrier; see cuda/update.cu */
  uint32_t done;           /* CUDA: blocks that are through; 0 between launches */
} fastmp_record;

/* What is asked of one step. The pointers lead to where the parameters live. */
typedef struct {
  const float* grad_scale; /* the loss scale the gradients carry; NULL: 1 */
  const float* found_inf;  /* non-zero: somebody else saw an overflow; NULL: nobody looked */
  double max_grad_norm;    /* clip the global norm to this; negative: do not clip */
  int64_t unchecked;      /* 1: without a clip, no phase 1; a gradient that is not finite goes in */
  const double* schedule; /* schedule_rows of (lr, momentum, max_grad_norm), by applied steps, the
                             last one for ever; NaN: as without a schedule. NULL: none */
  int64_t schedule_rows;
  fastmp_record* record; /* what the step decided */
} fastmp_request;

/* CUDA: a unit of work, 1,024 elements of one row, the last one of a row perhaps fewer. */
typedef struct {
  int32_t row;
  int32_t place; /* the unit's number within its row */
} fastmp_unit;

/* CUDA: the kernel's argument. */
typedef struct {
  const fastmp_row* rows;
  const fastmp_hyper* groups;
  const fastmp_unit* units;
  double* sums;       /* a span's sum of squares; see cuda/update.cu */
  int32_t* offenders; /* the first row of a span with a non-finite gradient */
  int32_t row_count;
  int32_t unit_count;
  int32_t units_per_span;
  int32_t span_count;
  fastmp_request request;
} fastmp_work;

#endif
