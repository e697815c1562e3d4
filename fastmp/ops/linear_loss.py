"""The last linear layer and its cross-entropy without whole logits, or with nothing beside them.

For rows x of the input, z = x Wᵀ + b, and with g = dloss/dz (``fastmp.ops.loss``)::

    dx = g W        dW = gᵀ x        db = Σ g

g takes the place of z. Arithmetic: the three products that the layer takes anyway. Of two ways each
has its own memory beside inputs and gradients, of N rows, H features and C classes in 16 bits:

=========== =============== ============================================================
``chunk``   bytes           extra passes
=========== =============== ============================================================
all rows    2 N C           none: dW is one product, rounded once
n rows      2 n C + 4 C H   dW is summed in fp32, 8 C H bytes read and written a chunk
=========== =============== ============================================================

So chunks save memory from N = 2 H + n on, or where W needs no gradient or is itself in fp32, as its
sum then is. With less memory, dW of 16 bits needs the logits twice: a fourth product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.registry import TorchOp
from fastmp.backends.torch_matmul import add_product, matmul, product, scaled
from fastmp.ops.checks import check_values, wide_dtype

_SLAB_BYTES = 32 << 20  # of a part of dW in fp32: it stays in the L2 of an H100, 50 MB


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
        x, own = input[part], _rows_of(spec, part)
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


def _rows_of(spec: LossSpec, part: slice) -> LossSpec:
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
        dw = _weight_gradient_in_parts(grad, input, factor)
    elif needs[1]:
        dw = matmul(grad.t(), input * factor)
    if needs[2]:
        db = scaled(grad.sum(0, dtype=wide), factor, dtype)
    return dx, dw, db


def _weight_gradient_in_parts(grad: Tensor, input: Tensor, factor: Tensor) -> Tensor:
    classes, features = grad.shape[1], input.shape[1]
    dw = input.new_empty((classes, features))
    rows = max(1, _SLAB_BYTES // (4 * max(1, features)))
    for begin in range(0, classes, rows):
        part = slice(begin, begin + rows)
        sums = product(grad[:, part].t(), input, torch.float32)
        torch.mul(sums, factor, out=dw[part])
    return dw


def _products_fake(
    grad: Tensor, input: Tensor, linear_weight: Tensor, factor: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    shapes = input.shape, linear_weight.shape, linear_weight.shape[:1]
    return tuple(
        input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )


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
)
