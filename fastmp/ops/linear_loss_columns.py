"""The last linear layer and its cross-entropy in little memory: the logits are computed twice.

A first sweep over chunks of rows gives the loss, and of each row what its gradient needs: row_max
and others (``fastmp.ops.loss``) and the targets' logits. A second one takes all rows and a part of
the classes at a time: z = x Wᵀ again for them, then g = dloss/dz in its place, and with it::

    dx += g W        dW = gᵀ x        db = Σ g

The part of dW is complete: one product, rounded once, where chunks of rows need a sum in fp32 of
4 C H bytes. Four products instead of three; beside inputs and gradients 2 n C bytes for chunks of n
rows in 16 bits, and 4 N H for the sum dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.registry import TorchOp
from fastmp.backends.torch_matmul import add_product, largest_in_fp16
from fastmp.ops.checks import check_values, wide_dtype
from fastmp.ops.linear_loss import SPEC_SCHEMA, rows_of, scaled, weight_gradient_in_parts

_VECTOR = 8  # 16-bit logits in 16 bytes


def first_sweep_reference(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, chunk: int, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """``fastmp::linear_loss_first_sweep``: the loss, and what the second sweep needs of each row.

    Args:
        input: (N, in_features).
        linear_weight: (C, in_features), the dtype of input.
        linear_bias: (C) or None.
        chunk: rows at a time.
        spec: targets and options; reduction sum, or none.

    Returns:
        the loss, () or (N); row_max, others and the logits of both targets, (N, 4); fp32 (fp64 for
        fp64).

    Raises:
        IndexError, ValueError: as ``check_values``.
    """
    classes = linear_weight.shape[0]
    check_values(spec, classes)
    loss, stats = _first_sweep_fake(input, linear_weight, linear_bias, chunk, spec)
    loss.zero_()
    for begin in range(0, len(input), chunk):
        part = slice(begin, begin + chunk)
        own = rows_of(spec, part)
        logits, _ = torch.ops.fastmp.linear(input[part], linear_weight, linear_bias, "none", False)
        chunk_loss, own_stats, _ = torch.ops.fastmp.loss_forward(logits, None, False, *own)
        stats[part, :2] = own_stats[:-1]
        if spec.reduction == Reduction.SUM:
            loss += chunk_loss
        else:
            loss[part] = chunk_loss
        for column, target in enumerate(_targets(own)):
            y = target.clamp(0, classes - 1)
            stats[part, 2 + column] = logits.gather(1, y[:, None])[:, 0].to(stats.dtype)
        del logits
    return loss, stats


def _first_sweep_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, chunk: int, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    rows, wide = input.shape[0], wide_dtype(input.dtype)
    loss = input.new_empty(() if spec.reduction == Reduction.SUM else (rows,), dtype=wide)
    return loss, input.new_empty((rows, 4), dtype=wide)


def _targets(spec: LossSpec) -> tuple[Tensor, Tensor]:
    return spec.target_a, spec.target_a if spec.target_b is None else spec.target_b


def gradient_of_rows(
    row_grad: Tensor, stats: Tensor, classes: int, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """What the gradient of a row's logits is made of, by ``loss_backward``'s formula.

    Args:
        row_grad: () or (N), the gradient of the rows' losses.
        stats: (N, 4), as the first sweep returned them.
        classes: C.
        spec: targets and options.

    Returns:
        (N, 5): row_max, scale and smooth_coef of ``scale·exp(z - row_max) - smooth_coef·w``, and
        the gradients at both targets; Q (N), which bounds them all.
    """
    row_max, others, z_a, z_b = stats.unbind(1)
    a, b = _targets(spec)
    mixes: tuple[Tensor | float, Tensor | float] = (1.0, 0.0)
    if spec.lam is not None:
        mixes = spec.lam, 1 - spec.lam
    total = stats.new_full((), classes)
    if spec.weight is not None:
        total = spec.weight.sum(dtype=stats.dtype)
    valid, w, target_coef = [], [], []
    smooth_coef = torch.zeros_like(row_max)
    for y, mix in zip((a, b), mixes, strict=True):
        counts = y != spec.ignore_index
        inside = (y >= 0) & (y < classes)
        index = y.clamp(0, classes - 1)
        own = torch.ones_like(row_max) if spec.weight is None else spec.weight[index].to(stats)
        share = torch.where(counts, row_grad * mix, 0).masked_fill(counts & ~inside, torch.nan)
        valid.append(counts)
        w.append(own)
        target_coef.append(share * (1 - spec.smoothing) * own)
        smooth_coef = smooth_coef + share * spec.smoothing / classes
    q = target_coef[0] + target_coef[1] + smooth_coef * total
    b_leads = valid[1] & (~valid[0] | (z_b > z_a))
    e_a, e_b = (z_a - row_max).exp(), (z_b - row_max).exp()
    sum_exp = others + torch.where(b_leads, e_b, e_a)
    scale = torch.where(q == 0, 0, q / sum_exp)
    same = valid[0] & valid[1] & (a == b)
    grads = []
    for i, leads, e in ((0, ~b_leads, e_a), (1, b_leads, e_b)):
        at_target = target_coef[i] + target_coef[1 - i] * same + smooth_coef * w[i]
        leading = ((q - at_target) * e - at_target * others) / sum_exp
        grads.append(torch.where(leads | same, leading, e * scale - at_target))
    return torch.stack((row_max, scale, smooth_coef, *grads), 1), q


def columns_reference(
    logits: Tensor,
    rows: Tensor,
    first: int,
    target_a: Tensor,
    target_b: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> None:
    """``fastmp::loss_columns_``: the gradient of some columns of logits, in their place.

    Args:
        logits: (N, n), of the classes first to first + n - 1; overwritten.
        rows: (N, 5), as ``gradient_of_rows`` returns them.
        first: the class of the first column.
        target_a, target_b: (N), over all classes; b None: one target.
        weight: class weights (C), or None.
        ignore_index: what no target is.
    """
    row_max, scale, smooth_coef, *at_targets = rows.unbind(1)
    e = (logits.to(rows.dtype) - row_max[:, None]).exp()
    width = logits.shape[1]
    own = smooth_coef[:, None]
    if weight is not None:
        own = own * weight[first : first + width].to(rows.dtype)
    grad = torch.where(scale[:, None] == 0, 0, scale[:, None] * e - own)
    column = torch.arange(first, first + width, device=logits.device)
    for target, at in zip((target_a, target_b), at_targets, strict=True):
        if target is not None:
            is_target = (column == target[:, None]) & (target != ignore_index)[:, None]
            grad = torch.where(is_target, at[:, None], grad)
    logits.copy_(grad)


def second_sweep_reference(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    stats: Tensor,
    row_grad: Tensor,
    chunk: int,
    needs: list[bool],
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::linear_loss_second_sweep``: dx, dW and db, a part of the classes at a time.

    fp16 gets the logits' gradients scaled to its range, and loses that in fp32.

    Args:
        input, linear_weight, linear_bias, chunk, spec: as ``linear_loss_first_sweep``; so many
            classes at a time as give chunks of as many logits.
        stats: (N, 4), of the first sweep.
        row_grad: () or (N), the gradient of the rows' losses.
        needs: whether to compute dx, dW and db.

    Returns:
        dx, dW and db in the dtype of input, rounded once; an empty tensor for each not needed.
    """
    (count, _), classes, dtype = input.shape, linear_weight.shape[0], input.dtype
    wide, weight = wide_dtype(dtype), spec.weight
    rows, q = gradient_of_rows(row_grad, stats, classes, spec)
    factor = rows.new_ones(())
    if dtype == torch.float16 and count:
        largest = q.abs().amax() / largest_in_fp16(input)
        factor = torch.where(largest > 0, largest, 1)
        rows = torch.cat((rows[:, :1], rows[:, 1:] / factor), 1)
    dx, dw, db = _empty_gradients(input, linear_weight, needs)
    sum_dx = input.new_zeros(dx.shape, dtype=wide)
    width = max(_VECTOR, chunk * classes // max(1, count) // _VECTOR * _VECTOR)
    for begin in range(0, classes, width):
        part = slice(begin, begin + width)
        own = linear_weight[part]
        bias = None if linear_bias is None else linear_bias[part]
        grad, _ = torch.ops.fastmp.linear(input, own, bias, "none", False)
        torch.ops.fastmp.loss_columns_(
            grad, rows, begin, spec.target_a, spec.target_b, weight, spec.ignore_index
        )
        if needs[0]:
            add_product(sum_dx, grad, own)
        if needs[1] and dtype == torch.float16:
            weight_gradient_in_parts(dw[part], grad, input, factor)
        elif needs[1]:
            add_product(dw[part], grad.t(), input, beta=0)
        if needs[2]:
            db[part] = grad.sum(0, dtype=wide) * factor
        del grad
    if needs[0]:
        dx = scaled(sum_dx, factor, dtype)
    return dx, dw, db


def _empty_gradients(
    input: Tensor, linear_weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = input.shape, linear_weight.shape, linear_weight.shape[:1]
    dx, dw, db = (
        input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )
    return dx, dw, db


_OPERANDS = "Tensor input, Tensor linear_weight, Tensor? linear_bias"
#: Entry points of the operation ``loss``.
LINEAR_LOSS_COLUMNS = (
    TorchOp(
        f"linear_loss_first_sweep({_OPERANDS}, int chunk, {SPEC_SCHEMA}) -> (Tensor, Tensor)",
        first_sweep_reference,
        _first_sweep_fake,
        spec=LossSpec,
    ),
    TorchOp(
        f"linear_loss_second_sweep({_OPERANDS}, Tensor stats, Tensor row_grad, int chunk, "
        f"bool[3] needs, {SPEC_SCHEMA}) -> (Tensor, Tensor, Tensor)",
        second_sweep_reference,
        lambda input, weight, bias, stats, row_grad, chunk, needs, spec: _empty_gradients(
            input, weight, needs
        ),
        spec=LossSpec,
    ),
    TorchOp(
        "loss_columns_(Tensor(a!) logits, Tensor rows, int first, Tensor target_a, "
        "Tensor? target_b, Tensor? weight, int ignore_index) -> ()",
        columns_reference,
        lambda *_: None,
    ),
)
