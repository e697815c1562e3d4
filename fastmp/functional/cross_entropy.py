"""Cross-entropy as a function, differentiable once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastmp.backends.abi import REDUCTION_CODES, LossSpec
from fastmp.ops.checks import (
    check_device,
    check_number,
    lam_of_rows,
    transformed,
    wide_dtype,
)
from fastmp.ops.loss import MixedTarget, forward_reference, precomputes_grad


class _CrossEntropy(torch.autograd.Function):
    """The forward writes the gradient where the backend precomputes it."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, assumed_grad_output: Tensor | None, compute_grad: bool, *spec: Any
    ) -> Tensor:
        loss, stats, grad = torch.ops.fastmp.loss_forward(
            logits, assumed_grad_output, compute_grad, *spec
        )
        # No attribute: checkpointing and saved_tensors_hooks drop or move what is saved here only.
        ctx.save_for_backward(
            logits, stats, assumed_grad_output, grad if compute_grad else None, *spec[:4]
        )
        ctx.options = spec[4:]
        ctx.grad_is_given = False
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint hands out each of them once
        if not torch.is_grad_enabled():
            grad = _CrossEntropy.gradient(ctx, saved, grad_output)
        else:  # create_graph=True
            with torch.no_grad():
                grad = _CrossEntropy.gradient(ctx, saved, grad_output)
            if not torch.compiler.is_compiling():
                grad = FirstOrderOnly.apply(grad, saved[0])  # type: ignore[no-untyped-call]
        return (grad, *[None] * 9)

    @staticmethod
    def gradient(ctx: Any, saved: tuple[Any, ...], grad_output: Tensor) -> Tensor:
        logits, stats, assumed_grad_output, grad, *tensors = saved
        arguments = (grad_output, logits, stats, *tensors, *ctx.options)
        # Under vmap many grad_outputs share one gradient: nothing is written in place.
        if grad is None or ctx.grad_is_given or transformed(grad_output):
            return cast(Tensor, torch.ops.fastmp.loss_backward(*arguments))
        ctx.grad_is_given = True  # once: autograd may then keep it without a copy
        grad = (
            grad.data
        )  # its own version counter: a second backward may still unpack the saved one
        torch.ops.fastmp.loss_ensure_grad_(grad, assumed_grad_output, *arguments)
        return cast(Tensor, grad)


class FirstOrderOnly(torch.autograd.Function):
    """The identity on the gradient; raises where it is differentiated.

    ``once_differentiable`` is not enough: where ``grad_output`` is a constant it makes the gradient
    one too, and a gradient penalty would silently be wrong.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        """The gradient; ``sources``: the tensors that it depends on."""
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        """Raise."""
        raise RuntimeError(
            "fastmp's cross_entropy and linear_cross_entropy have a first derivative only, but a "
            "second one was asked for; use torch.nn.functional.cross_entropy here"
        )


def cross_entropy(
    input: Tensor,
    target: Tensor | MixedTarget,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """``torch.nn.functional.cross_entropy``, also of mixed pairs of targets, in one pass.

    With ``target_b`` and ``lam``, or a ``MixedTarget``, the result is
    ``lam * CE(input, target) + (1 - lam) * CE(input, target_b)``, each CE reduced as torch does.
    Logits are never overwritten. Class probabilities as target are handed to torch. Under
    ``torch.func`` and in forward mode the same formula runs on torch's operations.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...), fp32, bf16, fp16 or fp64.
        target: class indices int64 or uint8, (), (N) or (N, d1, ...); or a ``MixedTarget``.
        weight: class weights (C), in the dtype of ``input`` or fp32.
        ignore_index: rows with this target add nothing; their gradient is 0.
        reduction: "none", "mean" or "sum".
        label_smoothing: ε in [0, 1].
        target_b: the second target, shaped as the first.
        lam: weight of the first target in [0, 1]: a number, a 0-d tensor, (N), or shaped as
            ``target``.
        grad_scale: the gradient of the loss that the backward will get, e.g. the loss scale. It
            changes no result; the backward is faster where it was right. Default: 1 (on a GPU for
            fp16: none, because a loss scale is likely).

    Returns:
        The loss, not scaled, in fp32 (fp64 for fp64 logits).

    Raises:
        IndexError: a target is out of range (CPU; on a GPU loss and gradient of its row are NaN).
        ValueError, TypeError, RuntimeError: as torch's, and for a ``lam`` outside [0, 1].
    """
    target, target_b, lam = unpack(target, target_b, lam)
    if target.shape == input.shape and input.dim() > 0:
        if target_b is not None and target_b is not target:
            raise TypeError(
                f"mixed targets must be class indices, got a target of the shape of input "
                f"{tuple(input.shape)}; mix class probabilities yourself and give one target"
            )
        return torch.nn.functional.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    spec = loss_spec(input, target, weight, ignore_index, reduction, label_smoothing, target_b, lam)
    wide = wide_dtype(input.dtype)
    logits = _as_rows(input)
    assumed_grad_output = _assumed_grad_output(grad_scale, logits.device, wide)
    loss: Tensor
    if transformed():
        loss = forward_reference(logits, assumed_grad_output, False, spec)[0]
    elif torch.is_grad_enabled() and logits.requires_grad:
        compute_grad = precomputes_grad(logits, spec.reduction, assumed_grad_output)
        loss = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            logits, assumed_grad_output, compute_grad, *spec
        )
    else:
        loss = torch.ops.fastmp.loss_forward(logits, assumed_grad_output, False, *spec)[0]
    if reduction != "none":
        return loss
    return loss.reshape(() if input.dim() == 1 else input.shape[:1] + input.shape[2:])


def loss_spec(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    target_b: Tensor | None,
    lam: Tensor | float | None,
) -> LossSpec:
    """The checked arguments of ``cross_entropy``, by rows; of ``input`` no value is read.

    Raises:
        ValueError, TypeError, RuntimeError: as ``cross_entropy``.
    """
    _check_options(input, weight, reduction, label_smoothing)
    targets = [_check_target(input, target, "target")]
    if target_b is not None:
        targets.append(_check_target(input, target_b, "target_b"))
    wide = wide_dtype(input.dtype)
    if isinstance(lam, Tensor):
        lam = lam_of_rows(lam, targets[0], input.device, wide)
    elif lam is not None:
        check_number(lam)
        lam = _host_number(lam, input.device, wide)
    return LossSpec(
        targets[0].flatten(),
        None if target_b is None else targets[1].flatten(),
        lam,
        weight,
        ignore_index,
        REDUCTION_CODES[reduction],
        float(label_smoothing),
    )


def unpack(
    target: Tensor | MixedTarget, target_b: Tensor | None, lam: Tensor | float | None
) -> tuple[Tensor, Tensor | None, Tensor | float | None]:
    """Both targets and λ, however they were given."""
    if isinstance(target, MixedTarget):
        if target_b is not None or lam is not None:
            raise ValueError("target is a MixedTarget already: leave out target_b and lam")
        return target
    if (target_b is None) != (lam is None):
        raise ValueError("target_b and lam belong together: give both or neither")
    return target, target_b, lam


def _check_options(
    input: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
) -> None:
    if reduction not in REDUCTION_CODES:
        raise ValueError(
            f"{reduction} is not a valid value for reduction: expected none, mean or sum"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if input.dim() == 0:
        raise RuntimeError("input must have the shape (C), (N, C) or (N, C, d1, ...), got a scalar")
    if not input.is_floating_point():
        raise NotImplementedError(
            f"input must be floating-point logits, got {input.dtype}; call .float()"
        )
    if weight is None:
        return
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight.shape != (classes,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but "
            f"got weight tensor of shape: {list(weight.shape)}"
        )
    if (
        weight.dtype not in (input.dtype, torch.float32)
        or weight.dtype == torch.float64 != input.dtype
    ):
        raise RuntimeError(
            f"weight must have the dtype of input ({input.dtype}) or float32, got {weight.dtype}"
        )
    check_device("weight", weight, input.device)
    if weight.requires_grad:
        raise RuntimeError("the derivative for 'weight' is not implemented: call weight.detach()")


def _check_target(input: Tensor, target: Tensor, name: str) -> Tensor:
    """The class indices as int64, in the shape (N, d1, ...)."""
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"expected {name} dtype to be Long or Byte, but got {target.dtype}; call .long()"
        )
    check_device(name, target, input.device)
    if input.dim() == 1:
        if target.dim() > 1 or target.numel() != 1:
            raise RuntimeError(
                f"{name} of an input of shape {tuple(input.shape)} must hold one class index, "
                f"got shape {tuple(target.shape)}"
            )
    else:
        expected = input.shape[:1] + input.shape[2:]
        if target.shape != expected:
            if target.shape[:1] != expected[:1]:
                got = target.shape[0] if target.dim() else "none, a scalar"
                raise ValueError(
                    f"Expected input batch_size ({expected[0]}) to match {name} batch_size ({got})."
                )
            raise RuntimeError(
                f"Expected {name} size {list(expected)}, got {list(target.shape)} "
                f"for an input of shape {list(input.shape)}"
            )
    return target if target.dtype == torch.int64 else target.long()


def _as_rows(input: Tensor) -> Tensor:
    """(rows, C): a view where the classes already lie side by side, else a copy."""
    if input.dim() == 1:
        return input.unsqueeze(0)
    if input.dim() == 2:
        return input
    rows = input.shape[0] * input.shape[2:].numel()
    return input.movedim(1, -1).reshape(rows, input.shape[1])


def _assumed_grad_output(
    grad_scale: Tensor | float | None, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    if grad_scale is None:
        return None
    if not isinstance(grad_scale, Tensor):
        return _host_number(grad_scale, device, dtype)
    if grad_scale.numel() != 1:
        raise ValueError(
            f"grad_scale must be a number or hold one value, got shape {tuple(grad_scale.shape)}"
        )
    # A copy: the scale may be updated between the forward and the backward.
    return grad_scale.detach().to(device, dtype, copy=True).reshape(())


def _host_number(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number as a tensor () on the host, which costs a GPU no launch: kernels take its value.

    On the device in a compiled graph, which a tensor of the host keeps from being a CUDA graph.
    """
    return torch.full(
        (), value, dtype=dtype, device=device if torch.compiler.is_compiling() else "cpu"
    )
