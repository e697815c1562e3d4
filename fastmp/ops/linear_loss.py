"""The last linear layer and its cross-entropy in chunks of rows, or with nothing beside the logits.

For rows x of the input, z = x Wᵀ + b, and with g = dloss/dz (``fastmp.ops.loss``)::

    dx = g W        dW = gᵀ x        db = Σ g

g takes the place of z. Memory beside inputs and gradients, of N rows, H features and C classes in
16 bits, and products of 2 N C H operations:

========================= =============== ======== ===========================================
way                       bytes           products extra passes
========================= =============== ======== ===========================================
all rows                  2 N C           3        none: dW is one product, rounded once
chunks of n rows          2 n C + 4 C H   3        8 C H bytes a chunk, of the sum dW in fp32
``linear_loss_columns``   2 n C + 4 N H   4        8 N H bytes a chunk, of the sum dx in fp32
========================= =============== ======== ===========================================

So chunks of rows save memory from N = 2 H + n on, or where dW needs no sum of its own: in fp32, or
where W is frozen. Three products within 300 MB are possible up to 1,170 rows of C = 128,256 only:
either the gradients of all logits are kept, or a sum in fp32. NVIDIA H200, 2026-11-27, bf16,
H = 4,096, device time over the three products alone, and MB beside inputs and gradients:

====================================== =========== ===========
N                                      2,048       8,192
====================================== =========== ===========
all rows                               1.03,  540  0.99, 2,170
chunks of 1,024 rows                   1.38, 2,130 1.12, 2,240
chunks of 4,096 rows                   -           1.02, 3,220
``linear_loss_columns``, n = 512       1.35,  160  1.30,  270
F.linear and F.cross_entropy           1.13,  530  1.15, 5,190
====================================== =========== ===========
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.registry import TorchOp
from fastmp.backends.torch_matmul import add_product, matmul, product
from fastmp.ops.checks import check_values, wide_dtype

# ---- chunks of rows ----


def linear_loss_reference(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    row_grad: Tensor | None,
    chunk: int,
    needs: list[bool],
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastmp::linear_loss``: the operations ``linear`` and ``loss`` on each chunk, two products.

    Args:
        input: (N, in_features).
        linear_weight: (C, in_features), the dtype of input.
        linear_bias: (C) or None.
        row_grad: (N), the gradients of the rows' losses, for reduction none; not read for sum.
        chunk: rows at a time.
        needs: whether to compute dx, dW and db.
        spec: targets and options; reduction sum, or none.

    Returns:
        the loss, () or (N); dx, dW and db in fp32 (fp64 for fp64), of the sum of the losses or for
        ``row_grad``; an empty tensor for each that is not needed.

    Raises:
        IndexError, ValueError: as ``check_values``.
    """
    check_values(spec, linear_weight.shape[0])
    loss, dx, dw, db = _outputs(input, linear_weight, needs, spec)
    rows, is_sum = input.shape[0], spec.reduction == Reduction.SUM
    for summed in (loss, db) if rows else (loss, dw, db):
        summed.zero_()
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        x, own = input[part], rows_of(spec, part)
        own_grad = None if row_grad is None else row_grad[part]
        logits, _ = torch.ops.fastmp.linear(x, linear_weight, linear_bias, "none", False)
        chunk_loss, grad = _chunk(logits, own_grad, any(needs), own)
        del logits
        if is_sum:
            loss += chunk_loss
        else:
            loss[part] = chunk_loss
        if needs[0]:
            add_product(dx[part], grad, linear_weight, beta=0)
        if needs[1]:
            add_product(dw, grad.t(), x, beta=1 if begin else 0)
        if needs[2]:
            db += grad.sum(0, dtype=db.dtype)
    return loss, dx, dw, db


def rows_of(spec: LossSpec, part: slice) -> LossSpec:
    """The targets and options of some rows."""
    per_row = spec.lam is not None and spec.lam.dim() > 0
    return spec._replace(
        target_a=spec.target_a[part],
        target_b=None if spec.target_b is None else spec.target_b[part],
        lam=spec.lam[part] if per_row and spec.lam is not None else spec.lam,
    )


def _chunk(
    logits: Tensor, row_grad: Tensor | None, needs_grad: bool, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk, and the gradient of its logits if needed, which may overwrite them."""
    operations = torch.ops.fastmp
    if needs_grad and spec.reduction == Reduction.SUM:
        loss, _ = operations.loss_forward_(logits, None, *spec)
        return loss, logits
    loss, stats, grad = operations.loss_forward(logits, None, False, *spec)
    if needs_grad:
        grad = operations.loss_backward(row_grad, logits, stats, *spec)
    return loss, grad


def _outputs(
    input: Tensor, linear_weight: Tensor, needs: list[bool], spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of the reference, not filled."""
    (rows, features), classes = input.shape, linear_weight.shape[0]
    wide = wide_dtype(input.dtype)
    loss = input.new_empty(() if spec.reduction == Reduction.SUM else (rows,), dtype=wide)
    shapes: tuple[tuple[int, ...], ...] = ((rows, features), (classes, features), (classes,))
    dx, dw, db = (
        input.new_empty(shape if need else (0,), dtype=wide)
        for shape, need in zip(shapes, needs, strict=True)
    )
    return loss, dx, dw, db


# ---- all rows at once ----


def all_rows_reference(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    assumed_grad_output: Tensor | None,
    spec: LossSpec,
) -> tuple[Tensor, Tensor]:
    """``fastmp::linear_loss_all_rows``: the loss, and the gradient of the logits in their memory.

    Args:
        input, linear_weight, linear_bias: as ``linear_loss``.
        assumed_grad_output: (), what the gradient is computed for; None: 1.
        spec: targets and options.

    Returns:
        the loss, () or (N), fp32 (fp64 for fp64); dloss/dz (N, C), in the dtype of input.

    Raises:
        IndexError, ValueError: as ``check_values``.
    """
    logits, _ = torch.ops.fastmp.linear(input, linear_weight, linear_bias, "none", False)
    loss, _ = torch.ops.fastmp.loss_forward_(logits, assumed_grad_output, *spec)
    return loss, logits


def _all_rows_fake(
    input: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    assumed: Tensor | None,
    spec: LossSpec,
) -> tuple[Tensor, Tensor]:
    rows = input.shape[0]
    shape = (rows,) if spec.reduction == Reduction.NONE else ()
    loss = input.new_empty(shape, dtype=wide_dtype(input.dtype))
    return loss, input.new_empty((rows, linear_weight.shape[0]))


def products_reference(
    grad: Tensor, input: Tensor, linear_weight: Tensor, factor: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::linear_loss_products``: factor · (dx, dW, db), each rounded once.

    For dW bf16, fp32 and fp64 take the factor into x, where it is exact if it is a power of two.
    fp16 has no range for that: its products come in fp32, a part of dW at a time.

    Args:
        grad: (N, C), as ``linear_loss_all_rows`` returned it.
        input, linear_weight: as there.
        factor: (), fp32 (fp64 for fp64).
        needs: whether to compute dx, dW and db.

    Returns:
        dx, dW and db in the dtype of input; an empty tensor for each that is not needed.
    """
    dtype, wide = input.dtype, wide_dtype(input.dtype)
    dx, dw, db = (input.new_empty(0) for _ in range(3))
    if needs[0]:
        dx = scaled(product(grad, linear_weight, wide), factor, dtype)
    if needs[1] and dtype == torch.float16:
        dw = torch.empty_like(linear_weight, memory_format=torch.contiguous_format)
        weight_gradient_in_parts(dw, grad, input, factor)
    elif needs[1]:
        dw = matmul(grad.t(), scaled(input, factor, dtype))
    if needs[2]:
        db = scaled(grad.sum(0, dtype=wide), factor, dtype)
    return dx, dw, db


def _products_fake(
    grad: Tensor, input: Tensor, linear_weight: Tensor, factor: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    shapes = input.shape, linear_weight.shape, linear_weight.shape[:1]
    return tuple(
        input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )


# ---- products, times a factor of the device ----


def scale_reference(out: Tensor, values: Tensor, factor: Tensor) -> None:
    """``fastmp::linear_loss_scale_``: out = factor · values, rounded once to the dtype of out.

    Args:
        out: overwritten.
        values: the shape of out.
        factor: (), fp32 (fp64 for fp64).
    """
    torch.mul(values, factor, out=out)


def scaled(wide: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """wide * factor, rounded once to this dtype, in one pass on a GPU; factor: a number."""
    out = wide.new_empty(wide.shape, dtype=dtype)
    torch.ops.fastmp.linear_loss_scale_(out, wide, factor)
    return out


#: Of a weight's gradient in fp32. NVIDIA H200, 2026-11-27, layer and loss both ways in fp16, 2,048
#: rows, H 4096, C 128256: 11.2, 10.6, 10.2, 10.0, 10.0 ms in parts of 16, 32, 64, 128, 256 MB.
PART_BYTES = 128 << 20


def weight_gradient_in_parts(out: Tensor, grad: Tensor, input: Tensor, factor: Tensor) -> None:
    """out = factor · (gradᵀ @ input) for 16 bits, of products in fp32, rounded once on a GPU.

    Args:
        out: (C, H).
        grad, input: (N, C) and (N, H), the dtype of out.
        factor: (), fp32.
    """
    classes, features = out.shape
    rows = max(1, PART_BYTES // (4 * max(1, features)))
    for begin in range(0, classes, rows):
        part = slice(begin, begin + rows)
        wide = product(grad[:, part].t(), input, torch.float32)
        torch.ops.fastmp.linear_loss_scale_(out[part], wide, factor)


_OPERANDS = "Tensor input, Tensor linear_weight, Tensor? linear_bias"
#: ``LossSpec`` in a schema.
SPEC_SCHEMA = (
    "Tensor target_a, Tensor? target_b, Tensor? lam, Tensor? weight, int ignore_index, "
    "int reduction, float smoothing"
)
#: Entry points of the operation ``loss``; they have no kernels of their own.
LINEAR_LOSS = (
    TorchOp(
        f"linear_loss({_OPERANDS}, Tensor? row_grad, int chunk, bool[3] needs, {SPEC_SCHEMA}) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        linear_loss_reference,
        lambda input, weight, bias, row_grad, chunk, needs, spec: _outputs(
            input, weight, needs, spec
        ),
        spec=LossSpec,
    ),
    TorchOp(
        f"linear_loss_all_rows({_OPERANDS}, Tensor? assumed_grad_output, {SPEC_SCHEMA}) "
        "-> (Tensor, Tensor)",
        all_rows_reference,
        _all_rows_fake,
        spec=LossSpec,
    ),
    TorchOp(
        "linear_loss_products(Tensor grad, Tensor input, Tensor linear_weight, Tensor factor, "
        "bool[3] needs) -> (Tensor, Tensor, Tensor)",
        products_reference,
        _products_fake,
    ),
    TorchOp(
        "linear_loss_scale_(Tensor(a!) out, Tensor values, Tensor factor) -> ()",
        scale_reference,
        lambda *_: None,
    ),
)
