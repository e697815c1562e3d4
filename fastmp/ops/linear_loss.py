"""The last linear layer and its cross-entropy, in chunks of rows: the logits are never whole.

For each chunk of rows x of the input, z = x Wᵀ + b, and with g = dloss/dz (``fastmp.ops.loss``)::

    dx = g W        dW += gᵀ x        db += Σ g

Memory beside the inputs and the gradients: z and g of one chunk. Arithmetic: the three products
that the layer takes anyway. dW and db are summed over the chunks in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.registry import TorchOp
from fastmp.backends.torch_matmul import add_product
from fastmp.ops.checks import check_values, wide_dtype


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
    loss, dx, dw, db = (t.zero_() for t in _outputs(input, linear_weight, needs, spec))
    rows, is_sum = input.shape[0], spec.reduction == Reduction.SUM
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
            add_product(dx[part], grad, linear_weight)
        if needs[1]:
            add_product(dw, grad.t(), x)
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
    """The loss of a chunk, and the gradient of its logits if needed."""
    operations = torch.ops.fastmp
    in_one_pass = needs_grad and spec.reduction == Reduction.SUM
    loss, stats, grad = operations.loss_forward(logits, None, in_one_pass, *spec)
    if needs_grad and not in_one_pass:
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


#: An entry point of the operation ``loss``; it has no kernel of its own.
LINEAR_LOSS = TorchOp(
    "linear_loss(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? row_grad, "
    "int chunk, bool[3] needs, Tensor target_a, Tensor? target_b, Tensor? lam, Tensor? weight, "
    "int ignore_index, int reduction, float smoothing) -> (Tensor, Tensor, Tensor, Tensor)",
    linear_loss_reference,
    lambda input, weight, bias, row_grad, chunk, needs, spec: _outputs(input, weight, needs, spec),
    spec=LossSpec,
)
