"""Cross-entropy of a mixed pair of targets with label smoothing.

For a row of logits z with targets a and b, mixing weight λ, smoothing ε and class weights w::

    pair = λ·CE(z, a) + (1-λ)·CE(z, b)
    CE(z, y) = (1-ε)·w_y·(lse(z) - z_y) + (ε/C)·Σ_c w_c·(lse(z) - z_c)

with the reductions and ``ignore_index`` of ``torch.nn.functional.cross_entropy`` for each of the
two. No one-hot and no soft target is built. The smoothing is that of Szegedy et al. 2016
(arXiv:1512.00567), the pair that of Zhang et al. 2018 (mixup, arXiv:1710.09412).

The forward can write the gradient in the same pass over the logits, for the incoming gradient that
is expected: 1, or the announced ``grad_scale``. If another one comes, ``loss_settle_`` computes it
anew from the logits, so what comes out is exact either way.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastmp.backends import registry, triton
from fastmp.backends.abi import DTYPE_CODES
from fastmp.backends.cpu import loss as cpu_loss
from fastmp.ops.checks import check_lam, transformed, wide_dtype

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_NONE, _MEAN = 0, 1


class MixedTarget(NamedTuple):
    """Targets of a mixed batch: class ``a`` with weight ``lam``, class ``b`` with ``1 - lam``.

    ``a`` and ``b`` are class indices (N), int64; ``lam`` is a number or floating, () or (N).
    """

    a: Tensor
    b: Tensor
    lam: Tensor | float


# ---- reference: plain PyTorch, any floating dtype, any device ----


def _raise_bad_target(name: str, row: int, value: int, classes: int, ignore_index: int) -> NoReturn:
    raise IndexError(
        f"Target {value} is out of bounds: expected class indices in [0, {classes}) or "
        f"ignore_index ({ignore_index}), got {value} in row {row} of {name}"
    ) from None  # a BadTarget of the library would say less


def _check_values(
    target: Tensor, target_b: Tensor | None, lam: Tensor | None, classes: int, ignore_index: int
) -> None:
    """Look at the values of CPU tensors; on a device that would wait for it."""
    for name, y in (("target", target), ("target_b", target_b)):
        if y is None or y.device.type != "cpu":
            continue
        bad = ((y < 0) | (y >= classes)) & (y != ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            _raise_bad_target(name, row, int(y[row]), classes, ignore_index)
    check_lam(lam)


def _class_weights(logits: Tensor, weight: Tensor | None) -> Tensor:
    wide = wide_dtype(logits.dtype)
    if weight is None:
        return torch.ones(logits.shape[1], dtype=wide, device=logits.device)
    return weight.to(wide)


def _pairs(
    target: Tensor, target_b: Tensor | None, lam: Tensor | None
) -> list[tuple[Tensor, Tensor | float]]:
    if target_b is None or lam is None:
        return [(target, 1.0)]
    return [(target, lam), (target_b, 1 - lam)]


def _target_weights(
    w: Tensor, y: Tensor, ignore_index: int, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, the class weight of each, and what the reduction divides by."""
    counts = y != ignore_index
    w_y = w[torch.where(counts, y, 0)] if w.numel() else w.new_zeros(y.shape)
    w_y = torch.where(counts, w_y, 0)
    return counts, w_y, w_y.sum() if reduction == _MEAN else w.new_ones(())


def forward_reference(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    smoothing: float,
    grad_scale: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward`` in plain PyTorch, differentiable as often as one likes.

    Args:
        logits: (N, C), floating.
        target: (N), int64.
        target_b: (N), int64, or None.
        lam: () or (N), weight of ``target``; None without ``target_b``.
        weight: (C) or None.
        ignore_index: rows with this target count for nothing.
        reduction: 0 none, 1 mean, 2 sum.
        smoothing: ε.
        grad_scale: (), the incoming gradient to expect; None: 1.
        with_grad: also compute the gradient.

    Returns:
        the loss, () or (N), fp32 (fp64 for fp64 logits); (N, 2), the largest logit and
        Σ exp(z - largest) of each row; the gradient (N, C) in the dtype of the logits, or (0).

    Raises:
        IndexError: a target on the CPU is out of range.
        ValueError: a λ on the CPU is outside [0, 1].
    """
    rows, classes = logits.shape
    if not transformed():  # under vmap there is not one value to look at
        _check_values(target, target_b, lam, classes, ignore_index)
    z = logits.to(wide_dtype(logits.dtype))
    w = _class_weights(logits, weight)
    largest = z.detach().amax(1) if classes else z.new_zeros(rows)  # it cancels: no derivative
    total = (z - largest[:, None]).exp().sum(1)
    log_p = z - largest[:, None] - total.log()[:, None]

    loss = z.new_zeros(rows if reduction == _NONE else ())
    for y, share in _pairs(target, target_b, lam):
        counts, w_y, divisor = _target_weights(w, y, ignore_index, reduction)
        at_y = torch.where(counts, y, 0)[:, None]
        picked = log_p.gather(1, at_y)[:, 0] if classes else z.new_zeros(rows)
        term = -(1 - smoothing) * w_y * picked
        if smoothing > 0:
            term = term - smoothing / max(classes, 1) * (log_p * w).sum(1)
        term = share * torch.where(counts, term, 0)
        loss = loss + (term if reduction == _NONE else term.sum() / divisor)

    stats = torch.stack((largest, total), 1)
    if not with_grad:
        return loss, stats, logits.new_empty(0)
    one = torch.ones((), dtype=z.dtype, device=z.device) if grad_scale is None else grad_scale
    grad = backward_reference(
        one, logits, target, target_b, lam, weight, stats, ignore_index, reduction, smoothing
    )
    return loss, stats, grad


def backward_reference(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    reduction: int,
    smoothing: float,
) -> Tensor:
    """``fastmp::loss_backward`` in plain PyTorch: gradient = incoming·(Σ_c q_c·softmax(z) - q).

    q is what the row's targets put on each class: (1-ε)·w_y at y and (ε/C)·w_c everywhere.

    Args:
        grad_output: (), or (N) for reduction none: the incoming gradient.
        stats: (N, 2), as ``loss_forward`` returned it. The other arguments are those it had.

    Returns:
        (N, C), in the dtype of the logits, rounded once.
    """
    rows, classes = logits.shape
    z = logits.to(wide_dtype(logits.dtype))
    w = _class_weights(logits, weight)
    softmax = (z - stats[:, :1]).exp() / stats[:, 1:]
    grad = torch.zeros_like(z, memory_format=torch.contiguous_format)
    if classes == 0:
        return grad.to(logits.dtype)
    for y, share in _pairs(target, target_b, lam):
        counts, w_y, divisor = _target_weights(w, y, ignore_index, reduction)
        at_y = torch.where(counts, y, 0)[:, None]
        q = (smoothing / classes * w).expand(rows, classes)
        q = q.scatter_add(1, at_y, (1 - smoothing) * w_y[:, None])
        incoming = (grad_output.to(z.dtype) * share / divisor).expand(rows)[:, None]
        term = incoming * (q.sum(1, keepdim=True) * softmax - q)
        grad = grad + torch.where(counts[:, None], term, 0)
    return grad.to(logits.dtype)


def settle_reference(
    grad: Tensor, expected: Tensor | None, grad_output: Tensor, logits: Tensor, *others: Any
) -> None:
    """``fastmp::loss_settle_`` in plain PyTorch: make ``grad`` that of the gradient that came.

    Args:
        grad: (N, C), as ``loss_forward`` wrote it for ``expected``; overwritten if need be.
        expected: (), the ``grad_scale`` of the forward; None: 1.
        grad_output: (), the incoming gradient.
        logits and others: as ``backward_reference``.
    """
    foretold = grad_output == (1 if expected is None else expected)
    if grad_output.device.type != "cpu":  # to look would be to wait
        anew = torch.ops.fastmp.loss_backward(grad_output, logits, *others)
        grad.copy_(torch.where(foretold, grad, anew))
    elif not foretold:
        grad.copy_(torch.ops.fastmp.loss_backward(grad_output, logits, *others))


# ---- native: fp32, fp16 and bf16 on the CPU ----


def _name_bad_target(
    bad: cpu_loss.BadTarget, target: Tensor, classes: int, ignore_index: int
) -> NoReturn:
    name = "target" if int(target[bad.row]) == bad.value else "target_b"
    _raise_bad_target(name, bad.row, bad.value, classes, ignore_index)


def forward_cpu(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward`` on the native library; arguments as ``forward_reference``."""
    arguments = (logits, target, target_b, lam, weight, ignore_index, *others)
    if logits.dtype not in DTYPE_CODES:
        return forward_reference(*arguments)
    check_lam(lam)
    try:
        return cpu_loss.forward(*arguments)
    except cpu_loss.BadTarget as bad:
        _name_bad_target(bad, target, logits.shape[1], ignore_index)


def backward_cpu(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    *others: Any,
) -> Tensor:
    """``fastmp::loss_backward`` on the native library; arguments as ``backward_reference``."""
    arguments = (logits, target, target_b, lam, weight, stats, ignore_index, *others)
    if logits.dtype not in DTYPE_CODES:
        return backward_reference(grad_output, *arguments)
    try:
        return cpu_loss.backward(grad_output, *arguments)
    except cpu_loss.BadTarget as bad:
        _name_bad_target(bad, target, logits.shape[1], ignore_index)


# ---- Triton: fp32, fp16 and bf16 on NVIDIA GPUs ----


def _on_triton(logits: Tensor) -> bool:
    return (
        logits.dtype in DTYPE_CODES
        and logits.numel() > 0
        and triton.supports_device(logits.device) is None
    )


def forward_cuda(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward`` on the Triton kernels; arguments as ``forward_reference``."""
    if not _on_triton(logits):
        return forward_reference(logits, *others)
    from fastmp.backends.triton import loss

    with torch.cuda.device_of(logits):
        return loss.forward(logits, *others)


def backward_cuda(grad_output: Tensor, logits: Tensor, *others: Any) -> Tensor:
    """``fastmp::loss_backward`` on the Triton kernels; arguments as ``backward_reference``."""
    if not _on_triton(logits):
        return backward_reference(grad_output, logits, *others)
    from fastmp.backends.triton import loss

    with torch.cuda.device_of(logits):
        return loss.backward(grad_output, logits, *others)


def settle_cuda(
    grad: Tensor, expected: Tensor | None, grad_output: Tensor, logits: Tensor, *others: Any
) -> None:
    """``fastmp::loss_settle_`` on the Triton kernels; arguments as ``settle_reference``."""
    if not _on_triton(logits):
        return settle_reference(grad, expected, grad_output, logits, *others)
    from fastmp.backends.triton import loss

    with torch.cuda.device_of(logits):
        loss.settle(grad, expected, grad_output, logits, *others)


def writes_ahead(logits: Tensor, reduction: int, grad_scale: Tensor | None) -> bool:
    """Whether the forward should write the gradient, for the incoming gradient it can foretell.

    A wrong guess costs a pass over the logits. It is sure to be wrong for fp16 on a GPU without
    ``grad_scale``: a loss scale will come. A compiled graph has nowhere to keep the gradient.
    """
    if reduction == _NONE or torch.compiler.is_compiling():
        return False
    if logits.device.type != "cuda":
        return logits.device.type == "cpu"
    foreseeable = grad_scale is not None or logits.dtype != torch.float16
    return foreseeable and triton.load()[0] is not None and _on_triton(logits)


# ---- schema, fakes, registration ----


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    smoothing: float,
    grad_scale: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    wide = wide_dtype(logits.dtype)
    loss = logits.new_empty((rows,) if reduction == _NONE else (), dtype=wide)
    grad = logits.new_empty((rows, classes) if with_grad else (0,))
    return loss, logits.new_empty((rows, 2), dtype=wide), grad


def _backward_fake(grad_output: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_library = torch.library.Library("fastmp", "FRAGMENT")
_library.define(
    "loss_forward(Tensor logits, Tensor target, Tensor? target_b, Tensor? lam, Tensor? weight, "
    "int ignore_index, int reduction, float smoothing, Tensor? grad_scale, bool with_grad) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "loss_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? target_b, "
    "Tensor? lam, Tensor? weight, Tensor stats, int ignore_index, int reduction, "
    "float smoothing) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "loss_settle_(Tensor(a!) grad, Tensor? expected, Tensor grad_output, Tensor logits, "
    "Tensor target, Tensor? target_b, Tensor? lam, Tensor? weight, Tensor stats, "
    "int ignore_index, int reduction, float smoothing) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("loss_forward", forward_reference, "CompositeExplicitAutograd")
_library.impl("loss_settle_", settle_reference, "CompositeExplicitAutograd")
_library.impl("loss_backward", backward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastmp::loss_forward", _forward_fake, lib=_library)
torch.library.register_fake("fastmp::loss_backward", _backward_fake, lib=_library)
torch.library.register_fake("fastmp::loss_settle_", lambda *_: None, lib=_library)

if registry.announce("loss", "cpu", "cpu"):
    _library.impl("loss_forward", forward_cpu, "CPU")
    _library.impl("loss_backward", backward_cpu, "CPU")

if registry.announce("loss", "cuda", "triton"):
    _library.impl("loss_forward", forward_cuda, "CUDA")
    _library.impl("loss_backward", backward_cuda, "CUDA")
    _library.impl("loss_settle_", settle_cuda, "CUDA")
