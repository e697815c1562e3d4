/* The multi-tensor table: one layout for the CPU library, the CUDA kernel and Python.
 * Python's mirror is fastmp/backends/table.py; a test compares the two field by field. */
#ifndef FASTMP_TABLE_H
#define FASTMP_TABLE_H

#ifndef __CUDACC_RTC__
#include <stdint.h>
#endif

enum fastmp_dtype { FASTMP_F32 = 0, FASTMP_F16 = 1, FASTMP_BF16 = 2, FASTMP_U8 = 3 };

enum fastmp_rule {
  FASTMP_ADAM = 0,     /* Adam and AdamW: states m, v */
  FASTMP_AMSGRAD = 1,  /* the same with the running maximum of v as third state */
  FASTMP_SGD = 2,      /* no state */
  FASTMP_MOMENTUM = 3, /* SGD with a momentum buffer as first state */
};

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
  uint8_t reserved[3];
} fastmp_row;

/* One parameter group's hyperparameters. All doubles, so that the groups of an optimizer are the
 * rows of one float64 matrix. */
typedef struct {
  double rule; /* fastmp_rule */
  double lr;
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
  float found_inf;  /* 1 if the last step was skipped, else 0 */
  float grad_norm;  /* global norm of the unscaled gradients, before clipping */
  int64_t applied;  /* steps that changed the parameters */
  int64_t skipped;  /* steps that did not */
  int64_t offender; /* index of the first row with a non-finite gradient; -1: none seen yet */
} fastmp_record;

#endif
