"""Cross-entropy of a mixed pair of targets with label smoothing.

For a row of logits z with targets a and b, mixing weight λ, smoothing ε and class weights w::

    pair = λ·CE(z, a) + (1-λ)·CE(z, b)
    CE(z, y) = (1-ε)·w_y·(lse(z) - z_y) + (ε/C)·Σ_c w_c·(lse(z) - z_c)

with the reductions and ``ignore_index`` of ``torch.nn.functional.cross_entropy`` for each of the
two. No one-hot and no soft target is built. The smoothing is that of Szegedy et al. 2016
(arXiv:1512.00567), the pair that of Zhang et al. 2018 (mixup, arXiv:1710.09412).

The forward can write the gradient in the same pass over the logits, for an assumed gradient of the
loss: 1, or ``grad_scale``. If ``grad_output`` is another one, ``loss_ensure_grad_`` computes the
gradient from the logits: the result is exact either way.

Where softmax p_t of a target t is close to 1, 1 - p_t and log p_t lose their digits. So the larger
of a row's targets is left out of the sum of exponentials: ``others`` = Σ_{c != t} e_c. With it
1 - p_t = others / (others + e_t) is exact to rounding (docs/numerics.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmp.backends import registry
from fastmp.backends.abi import LossSpec, Reduction
from fastmp.ops.checks import check_lam, check_values, transformed, wide_dtype
from fastmp.ops.linear_loss import LINEAR_LOSS, SPEC_SCHEMA
from fastmp.ops.linear_loss_columns import LINEAR_LOSS_COLUMNS


class MixedTarget(NamedTuple):
    """Targets of a mixed batch: class ``a`` with weight ``lam``, class ``b`` with ``1 - lam``.

    ``a`` and ``b`` are class indices (N) or (N, d1, ...), int64 or uint8; ``lam`` is a number or
    floating, () or (N). Targets that are mixed themselves are both ``a`` and ``b``; those may be
    class probabilities too.
    """

    a: Tensor
    b: Tensor
    lam: Tensor | float


def precomputes_grad(logits: Tensor, reduction: int, assumed_grad_output: Tensor | None) -> bool:
    """Whether the forward should write the gradient, for the assumed ``grad_output``.

    A wrong assumption costs a pass over the logits. A compiled graph cannot keep the gradient.
    """
    if reduction == Reduction.NONE or torch.compiler.is_compiling():
        return False
    return registry.ask(
        "loss_forward", "precomputes_grad", logits.device, logits, assumed_grad_output,
        default=False,
    )  # fmt: skip


# ---- reference: plain PyTorch, any floating dtype, any device ----


def _class_weights(logits: Tensor, weight: Tensor | None) -> Tensor:
    wide = wide_dtype(logits.dtype)
    if weight is None:
        return torch.ones(logits.shape[1], dtype=wide, device=logits.device)
    return weight.to(wide)


class _Target(NamedTuple):
    y: Tensor  # (N, 1), 0 where ignored
    valid: Tensor  # (N): not ignored
    w: Tensor  # (N), class weight, 0 where ignored
    mix_weight: Tensor | float  # () or (N)
    divisor: Tensor  # (), of the reduction


def _targets(spec: LossSpec, w: Tensor) -> list[_Target]:
    pairs: list[tuple[Tensor, Tensor | float]] = [(spec.target_a, 1.0)]
    if spec.target_b is not None and spec.lam is not None:
        pairs = [(spec.target_a, spec.lam), (spec.target_b, 1 - spec.lam)]
    targets = []
    for target, mix_weight in pairs:
        valid = target != spec.ignore_index
        y = torch.where(valid, target, 0)
        w_y = w[y] if w.numel() else w.new_zeros(y.shape)
        w_y = torch.where(valid, w_y, 0)
        divisor = w_y.sum() if spec.reduction == Reduction.MEAN else w.new_ones(())
        targets.append(_Target(y[:, None], valid, w_y, mix_weight, divisor))
    return targets


def _left_out(z: Tensor, targets: list[_Target]) -> Tensor:
    """(N, 1): the row's target with the larger logit; the first one on a tie."""
    a, b = targets[0], targets[-1]
    z_a, z_b = (torch.where(t.valid[:, None], z.gather(1, t.y), -torch.inf) for t in (a, b))
    return torch.where(z_b > z_a, b.y, a.y)


def forward_reference(
    logits: Tensor, assumed_grad_output: Tensor | None, compute_grad: bool, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward`` in plain PyTorch, differentiable any number of times.

    Args:
        logits: (N, C), floating.
        assumed_grad_output: (), what the gradient is computed for; None: 1.
        compute_grad: also compute the gradient.
        spec: targets and options.

    Returns:
        the loss, () or (N), fp32 (fp64 for fp64 logits); the statistics (N + 1, 2): row_max and
        others of each row, the sum of exp(z - row_max) over all classes but the larger target, and
        a last row of the backend's own; the gradient (N, C) in the dtype of the logits, or (0).

    Raises:
        IndexError: a target on the host is out of range.
        ValueError: a λ on the host is outside [0, 1].
    """
    rows, classes = logits.shape
    if not transformed():  # under vmap a tensor has many values
        check_values(spec, classes)
    z = logits.to(wide_dtype(logits.dtype))
    w = _class_weights(logits, spec.weight)
    targets = _targets(spec, w)
    if classes:
        y_t = _left_out(z.detach(), targets)
        row_max = z.detach().amax(1, keepdim=True)  # it cancels: no derivative
        others = (z - row_max).exp().scatter(1, y_t, 0).sum(1, keepdim=True)
        z_t = z.gather(1, y_t)
        log_p = z - row_max - (others + (z_t - row_max).exp()).log()
        # -log p_t = log(1 + Σ_{c != t} exp(z_c - z_t)), which autograd differentiates without loss
        margin = z.scatter(1, y_t, -torch.inf).logsumexp(1, keepdim=True) - z_t
        log_p = log_p.scatter(1, y_t, -F.softplus(margin, threshold=50))
    else:
        log_p, row_max, others = z, z.new_zeros(rows, 1), z.new_zeros(rows, 1)

    loss = z.new_zeros(rows if spec.reduction == Reduction.NONE else ())
    for t in targets:
        log_p_y = log_p.gather(1, t.y)[:, 0] if classes else z.new_zeros(rows)
        term = -(1 - spec.smoothing) * t.w * log_p_y
        if spec.smoothing > 0:
            term = term - spec.smoothing / max(classes, 1) * (log_p * w).sum(1)
        term = t.mix_weight * torch.where(t.valid, term, 0)
        loss = loss + (term if spec.reduction == Reduction.NONE else term.sum() / t.divisor)

    stats = torch.cat((torch.cat((row_max, others), 1), row_max.new_ones(1, 2)))
    if not compute_grad:
        return loss, stats, logits.new_empty(0)
    if assumed_grad_output is None:
        assumed_grad_output = torch.ones((), dtype=z.dtype, device=z.device)
    return loss, stats, backward_reference(assumed_grad_output, logits, stats, spec)


def forward_in_place_reference(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """``fastmp::loss_forward_`` in plain PyTorch: the gradient takes the place of the logits.

    Args:
        logits: (N, C), floating; overwritten.
        assumed_grad_output: (), what the gradient is computed for; None: 1.
        spec: targets and options.

    Returns:
        loss and statistics, as ``loss_forward``.

    Raises:
        IndexError, ValueError: as ``loss_forward``.
    """
    loss, stats, grad = forward_reference(logits, assumed_grad_output, True, spec)
    logits.copy_(grad)
    return loss, stats


def backward_reference(
    grad_output: Tensor, logits: Tensor, stats: Tensor, spec: LossSpec
) -> Tensor:
    """``fastmp::loss_backward`` in plain PyTorch: grad_output·(Q·softmax(z) - q), Q = Σ q.

    q is what the row's targets put on each class: (1-ε)·w_y at y and (ε/C)·w_c everywhere. At the
    larger target t it is (Q - q_t)·p_t - q_t·(1 - p_t), without cancellation.

    Args:
        grad_output: (), or (N) for reduction none: the gradient of the loss.
        logits: (N, C), floating.
        stats: (N + 1, 2), as ``loss_forward`` returned them.
        spec: targets and options.

    Returns:
        (N, C), in the dtype of the logits, rounded once.
    """
    rows, classes = logits.shape
    z = logits.to(wide_dtype(logits.dtype))
    w = _class_weights(logits, spec.weight)
    grad = torch.zeros_like(z, memory_format=torch.contiguous_format)
    if classes == 0:
        return grad.to(logits.dtype)
    targets = _targets(spec, w)
    y_t = _left_out(z, targets)
    e, others = (z - stats[:-1, :1]).exp(), stats[:-1, 1:]
    e_t = e.gather(1, y_t)
    sum_exp = others + e_t
    smooth_w = spec.smoothing / classes * w
    for t in targets:
        target_q = (1 - spec.smoothing) * t.w[:, None]
        at_t = torch.where(t.y == y_t, target_q, 0)
        q_t, rest = smooth_w[y_t] + at_t, smooth_w.sum() - smooth_w[y_t] + target_q - at_t
        q = smooth_w.expand(rows, classes).scatter_add(1, t.y, target_q)
        term = (q_t + rest) * e / sum_exp - q
        term = term.scatter(1, y_t, (rest * e_t - q_t * others) / sum_exp)
        coef = (grad_output.to(z.dtype) * t.mix_weight / t.divisor).expand(rows)[:, None]
        grad = grad + torch.where(t.valid[:, None], coef * term, 0)
    return grad.to(logits.dtype)


def ensure_grad_reference(
    grad: Tensor,
    assumed_grad_output: Tensor | None,
    grad_output: Tensor,
    logits: Tensor,
    stats: Tensor,
    spec: LossSpec,
) -> None:
    """``fastmp::loss_ensure_grad_`` in plain PyTorch: make ``grad`` the one of ``grad_output``.

    Args:
        grad: (N, C), as ``loss_forward`` wrote it; overwritten where the assumption was wrong.
        assumed_grad_output: (), that of the forward; None: 1.
        grad_output: (), the gradient of the loss.
        logits: (N, C), floating.
        stats: (N + 1, 2), as ``loss_forward`` returned it.
        spec: targets and options.
    """
    assumed = 1.0 if assumed_grad_output is None else assumed_grad_output
    if registry.on_host(grad_output):  # numbers: a comparison of tensors takes 2 us
        if grad_output.item() != float(assumed):
            grad.copy_(torch.ops.fastmp.loss_backward(grad_output, logits, stats, *spec))
    else:
        computed = torch.ops.fastmp.loss_backward(grad_output, logits, stats, *spec)
        grad.copy_(torch.where(grad_output == assumed, grad, computed))


# ---- schema and fakes ----


def _forward_fake(
    logits: Tensor, assumed_grad_output: Tensor | None, compute_grad: bool, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    wide = wide_dtype(logits.dtype)
    loss = logits.new_empty((rows,) if spec.reduction == Reduction.NONE else (), dtype=wide)
    grad = logits.new_empty((rows, classes) if compute_grad else (0,))
    return loss, logits.new_empty((rows + 1, 2), dtype=wide), grad


def _backward_fake(grad_output: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


registry.define(
    "loss",
    registry.TorchOp(
        "loss_forward(Tensor logits, Tensor? assumed_grad_output, bool compute_grad, "
        f"{SPEC_SCHEMA}) -> (Tensor, Tensor, Tensor)",
        forward_reference,
        _forward_fake,
        lambda logits, assumed, compute, spec: check_lam(spec.lam),  # kernels check the targets
        LossSpec,
    ),
    registry.TorchOp(
        f"loss_forward_(Tensor(a!) logits, Tensor? assumed_grad_output, {SPEC_SCHEMA}) "
        "-> (Tensor, Tensor)",
        forward_in_place_reference,
        lambda logits, assumed, spec: _forward_fake(logits, assumed, False, spec)[:2],
        lambda logits, assumed, spec: check_lam(spec.lam),
        LossSpec,
    ),
    registry.TorchOp(
        f"loss_backward(Tensor grad_output, Tensor logits, Tensor stats, {SPEC_SCHEMA}) -> Tensor",
        backward_reference,
        _backward_fake,
        spec=LossSpec,
    ),
    registry.TorchOp(
        "loss_ensure_grad_(Tensor(a!) grad, Tensor? assumed_grad_output, Tensor grad_output, "
        f"Tensor logits, Tensor stats, {SPEC_SCHEMA}) -> ()",
        ensure_grad_reference,
        lambda *_: None,
        spec=LossSpec,
    ),
    *LINEAR_LOSS,
    *LINEAR_LOSS_COLUMNS,
)
