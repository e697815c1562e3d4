"""The last linear layer and its cross-entropy as one function, without the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.torch_matmul import (
    computes_logits_twice,
    largest_in_fp16,
    rows_at_once,
)
from fastmp.functional.cross_entropy import FirstOrderOnly, cross_entropy, loss_spec, unpack
from fastmp.functional.linear import autocast_operands, check_operands
from fastmp.ops.checks import transformed, wide_dtype
from fastmp.ops.linear_loss import scaled
from fastmp.ops.loss import MixedTarget


class _LinearCrossEntropy(torch.autograd.Function):
    """A sum of rows' losses: the forward writes the gradients too, in fp32, for a gradient of 1.

    For reduction none the gradients wait for ``grad_output``, and the logits are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weight: Tensor | None,
        chunk: int,
        *spec: Any,
    ) -> Tensor:
        needs = list(ctx.needs_input_grad[:3])
        is_sum = LossSpec(*spec).reduction == Reduction.SUM or row_weight is not None
        loss, *grads = torch.ops.fastmp.linear_loss(
            input, weight, bias, row_weight, chunk, needs if is_sum else [False] * 3, *spec
        )
        ctx.save_for_backward(input, weight, bias, *spec[:4], *(grads if is_sum else ()))
        ctx.options = chunk, needs, spec[4:]
        if row_weight is not None:
            loss = (row_weight * loss).sum()
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, *tensors = ctx.saved_tensors
        chunk, needs, options = ctx.options
        with torch.no_grad():
            factor, grads = grad_output, tensors[4:]
            if not grads:
                _, *grads = torch.ops.fastmp.linear_loss(
                    input, weight, bias, grad_output, chunk, needs, *tensors[:4], *options
                )
                factor = grad_output.new_ones(())
            # vmap has no rule for results that are written into memory
            batched = not torch.compiler.is_compiling() and transformed(grad_output)
            times = _product if batched else scaled
            results = [
                times(grad, factor, input.dtype) if need else None
                for grad, need in zip(grads, needs, strict=True)
            ]
        return (*_first_order_only(results, input, weight), *[None] * 9)


class _AllRows(torch.autograd.Function):
    """All rows at once: the forward keeps the gradient of the logits, the backward multiplies."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        assumed_grad_output: Tensor | None,
        *spec: Any,
    ) -> Tensor:
        loss, grad = torch.ops.fastmp.linear_loss_all_rows(
            input, weight, bias, assumed_grad_output, *spec
        )
        ctx.save_for_backward(grad, input, weight, assumed_grad_output)
        ctx.needs = list(ctx.needs_input_grad[:3])
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad, input, weight, assumed_grad_output = ctx.saved_tensors
        with torch.no_grad():
            factor = grad_output
            if assumed_grad_output is not None:
                factor = grad_output / assumed_grad_output
            grads = torch.ops.fastmp.linear_loss_products(grad, input, weight, factor, ctx.needs)
            results = [g if need else None for g, need in zip(grads, ctx.needs, strict=True)]
        return (*_first_order_only(results, input, weight), *[None] * 8)


class _TwoSweeps(torch.autograd.Function):
    """Chunks of rows for the loss, chunks of classes for the gradients: the logits twice."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weight: Tensor | None,
        chunk: int,
        *spec: Any,
    ) -> Tensor:
        loss, stats = torch.ops.fastmp.linear_loss_first_sweep(input, weight, bias, chunk, *spec)
        ctx.save_for_backward(input, weight, bias, stats, row_weight, *spec[:4])
        ctx.options = chunk, list(ctx.needs_input_grad[:3]), spec[4:]
        if row_weight is not None:
            loss = (row_weight * loss).sum()
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, stats, row_weight, *tensors = ctx.saved_tensors
        chunk, needs, options = ctx.options
        with torch.no_grad():
            row_grad = grad_output if row_weight is None else grad_output * row_weight
            grads = torch.ops.fastmp.linear_loss_second_sweep(
                input, weight, bias, stats, row_grad, chunk, needs, *tensors, *options
            )
            results = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*_first_order_only(results, input, weight), *[None] * 9)


def _product(wide: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (wide * factor).to(dtype)


def _first_order_only(
    grads: list[Tensor | None], input: Tensor, weight: Tensor
) -> list[Tensor | None]:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    return [  # create_graph=True
        None if grad is None else FirstOrderOnly.apply(grad, input, weight)  # type: ignore[no-untyped-call]
        for grad in grads
    ]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | MixedTarget,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without the logits.

    ``torch.nn.functional.linear_cross_entropy``, also of mixed pairs of targets. Rows go through
    layer and loss in chunks, whose logits give way to their gradients; or all at once, which on a
    GPU is the default while that costs no more memory (``fastmp.backends.torch_matmul``). What is
    kept for the backward is multiplied by its ``grad_output`` before it is rounded, or by a power
    of two after it; a loss scale need not be known ahead. Follows ``torch.autocast``. Under
    ``torch.func`` and in forward mode the logits are whole.

    Bytes beside inputs and gradients, for N rows, H features, C classes and n = ``chunk``: 2 N C
    for all rows in 16 bits, of which eager PyTorch has 6 N C before there are gradients. On a GPU a
    ``chunk`` of less makes it 2 n C + 4 N H and the logits are computed twice, four products
    instead of three. In fp32, on a CPU and where the weight is frozen there is no fourth product.

    Args:
        input: (in_features) or (N, in_features), fp32, bf16, fp16 or fp64.
        linear_weight: (C, in_features), the dtype of ``input``; may be the embedding's (tied).
        target: class indices int64 or uint8, () or (N); or a ``MixedTarget``.
        linear_bias: (C) or None.
        weight: class weights (C), in the dtype of ``input`` or fp32.
        ignore_index: rows with this target add nothing; their gradient is 0.
        reduction: "none", "mean" or "sum". With "none" the logits are computed twice.
        label_smoothing: ε in [0, 1].
        target_b: the second target, shaped as the first.
        lam: weight of the first target in [0, 1]: a number, a 0-d tensor or (N).
        chunk: rows at a time, at least 1. None: logits of 32 MB on a CPU; on a GPU all rows, from
            2 H + 4,096 in 16 bits on chunks of 4,096 and a sum of 4 C H bytes; 128 MB if the
            weight needs no gradient.

    Returns:
        The loss in fp32 (fp64 for fp64): a scalar, or for "none" () or (N).

    Raises:
        IndexError: a target is out of range (CPU; on a GPU loss and gradients are NaN).
        ValueError, TypeError, RuntimeError: as ``linear`` and ``cross_entropy``, a ``chunk`` below
            1, or an input of more dimensions.
    """
    target, target_b, lam = unpack(target, target_b, lam)
    if linear_weight.dim() != 2:
        raise RuntimeError(
            f"linear_weight must have the shape (C, in_features), got {tuple(linear_weight.shape)}"
        )
    if input.dim() not in (1, 2):
        raise RuntimeError(
            f"input must have the shape (N, {linear_weight.shape[1]}), got {tuple(input.shape)}; "
            "flatten input and target, e.g. hidden.flatten(0, 1) and labels.flatten()"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    input, linear_weight, linear_bias = autocast_operands(input, linear_weight, linear_bias)
    check_operands(input, linear_weight, linear_bias)
    classes = linear_weight.shape[0]
    like_logits = input.new_empty(()).expand(*input.shape[:-1], classes)
    spec = loss_spec(
        like_logits, target, weight, ignore_index, reduction, label_smoothing, target_b, lam
    )
    if transformed():
        logits = F.linear(input, linear_weight, linear_bias)
        return cross_entropy(
            logits, target, weight, ignore_index, reduction, label_smoothing,
            target_b=target_b, lam=lam,
        )  # fmt: skip
    rows = input if input.dim() == 2 else input.unsqueeze(0)
    needs_sum = torch.is_grad_enabled() and linear_weight.requires_grad
    twice = needs_sum and (chunk is not None or reduction == "none")
    twice = twice and computes_logits_twice(linear_weight)
    chunk = chunk or rows_at_once(len(rows), linear_weight, needs_sum and not twice)
    operands = (rows, linear_weight, linear_bias)
    if needs_sum and chunk >= len(rows) and reduction != "none":
        return cast(Tensor, _AllRows.apply(*operands, _assumed_grad_output(rows, spec), *spec))  # type: ignore[no-untyped-call]
    apply = cast(Callable[..., Tensor], (_TwoSweeps if twice else _LinearCrossEntropy).apply)
    if reduction == "none":
        return apply(*operands, None, chunk, *spec).reshape(input.shape[:-1])
    if reduction == "sum":
        return apply(*operands, None, chunk, *spec)
    undefined, scale, row_weight, spec = _mean_as_sum(rows, spec)
    loss = apply(*operands, row_weight, chunk, *spec) * scale
    return torch.where(undefined, torch.nan, loss)


def _assumed_grad_output(input: Tensor, spec: LossSpec) -> Tensor | None:
    """What keeps the logits' gradients of fp16 in its range; None for the other dtypes: 1."""
    if input.dtype != torch.float16:
        return None
    largest = torch.full((), largest_in_fp16(input), dtype=torch.float32, device=input.device)
    if spec.weight is not None:
        largest = largest / spec.weight.float().abs().amax().clamp(min=1e-4)
    if spec.reduction == Reduction.SUM:
        return largest
    divisor = _divisor(spec.target_a, input, spec)
    if spec.target_b is not None:
        divisor_b = _divisor(spec.target_b, input, spec)
        divisor = torch.where(divisor > 0, torch.minimum(divisor, divisor_b), divisor_b)
    return torch.where(divisor > 0, largest * divisor, largest)


def _mean_as_sum(input: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None, LossSpec]:
    """A mean as a sum: gradients in 16 bits are then near 1, whatever the number of rows.

    The two targets of a pair have divisors of their own: λ/A and (1-λ)/B are r λ' and r (1-λ') with
    a weight r of the row, taken relative to the largest one.

    Returns:
        whether a divisor is 0; the factor of the sum; r (N) or None; targets and options.
    """
    divisor = _divisor(spec.target_a, input, spec)
    undefined, row_weight = divisor == 0, None
    scale = torch.where(undefined, 0, 1 / divisor)  # every target is ignored: no gradient
    spec = spec._replace(reduction=Reduction.SUM)
    if spec.target_b is not None and spec.lam is not None:
        divisor_b = _divisor(spec.target_b, input, spec)
        undefined = undefined | (divisor_b == 0)
        share_a = (spec.lam * scale).expand(len(input))
        share_b = ((1 - spec.lam) * torch.where(divisor_b == 0, 0, 1 / divisor_b)).expand(
            len(input)
        )
        total = share_a + share_b
        scale = total.max() if len(input) else total.sum()
        lam = torch.where(total > 0, share_a / total, 0)
        row_weight = torch.where(total > 0, total / scale, 0)
        spec = spec._replace(reduction=Reduction.NONE, lam=lam)
    return undefined, scale, row_weight, spec


def _divisor(target: Tensor, input: Tensor, spec: LossSpec) -> Tensor:
    """The divisor of a mean: the number of targets that count, or the sum of their weights."""
    wide, valid = wide_dtype(input.dtype), target != spec.ignore_index
    if spec.weight is None:
        return valid.sum().to(wide)
    inside = target.clamp(0, max(0, len(spec.weight) - 1))  # the operation tells of the others
    weights = spec.weight.to(wide)[inside]
    return torch.where(valid, weights, 0).sum()
