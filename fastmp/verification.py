"""Checks of the numerics on the user's own device: every operation against fp64, and against torch.

    error = max |value - reference| / max |reference|

The reference is the same formula in fp64, on the very inputs that were rounded to the dtype. An
operation passes if its error is at most twice that of torch in the same dtype, three times for
sums over the batch: those are of numbers of one sign and the order of adding them is free.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmp import amp, functional, models, optim
from fastmp.ops.linear import activate
from fastmp.optim.base import FusedOptimizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "gelu", "silu")
LINEAR = ((256, 1024, 512), (33, 130, 65))  # M, K, N: a kernel's, an odd one
LOSS = ((256, 10), (64, 1000), (8, 32003))  # rows, classes
MIX = ((64, 3, 32, 32), (7, 1, 28, 28))
WEIGHTS = ((256, 129), (1000,), (3,))
CONFIDENT = (0.9, 0.99, 0.999, 0.9999)  # softmax at the true class, of one row after the other
CONFIDENT_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 6e-4}
STEPS = 20
SCALE = 1024.0  # of the loss, so that fp16 gradients are not all subnormal
_MIN_LIMIT = 4 * torch.finfo(torch.float32).eps  # also where torch's error is zero

Values = dict[str, Tensor]  # results of an operation, by name
Model = Callable[[models.Shape, int], nn.Module]
_SUMS = ("dW", "db")  # over the batch


@dataclass(frozen=True)
class Check:
    """One value of one operation; errors are relative to the largest entry of the reference.

    ``torch_error`` is None where torch has no counterpart; ``limit`` bounds ``error``.
    """

    op: str
    value: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    error: float
    torch_error: float | None
    limit: float

    @property
    def ratio(self) -> float | None:
        """Our error over torch's."""
        return self.error / self.torch_error if self.torch_error else None

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


def verify(
    device: str | torch.device = "cpu",
    dtypes: Sequence[torch.dtype] = DTYPES,
    model: str | Model | None = None,
    in_shape: models.Shape = (1, 28, 28),
    classes: int = 10,
    seed: int = 0,
) -> list[Check]:
    """Check every operation, and a model if one is given.

    Args:
        device: of all tensors.
        dtypes: of the values, any of fp32, bf16 and fp16.
        model: a name that ``models.build`` knows, ``package.module:factory``, or the factory
            itself; loss and gradients of a batch of random images are compared.
        in_shape: (C, H, W) of the model's images.
        classes: of the model.
        seed: of all that is random.

    Returns:
        one ``Check`` per operation, value, shape and dtype.

    Raises:
        fastmp.models.ModelError: the name leads to no model.
    """
    return list(checks(device, dtypes, model, in_shape, classes, seed))


def checks(
    device: str | torch.device,
    dtypes: Sequence[torch.dtype],
    model: str | Model | None,
    in_shape: models.Shape,
    classes: int,
    seed: int,
) -> Iterator[Check]:
    """``verify`` as an iterator; its arguments and errors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(model, str):
            built: nn.Module | None = models.build(model, in_shape, classes)
        else:
            built = None if model is None else model(in_shape, classes)
        for dtype in dtypes:
            suite = _Suite(torch.device(device), dtype)
            yield from suite.linear()
            yield from suite.loss()
            yield from suite.confident()
            yield from suite.mix()
            yield from suite.optimizers()
            yield suite.overflow()
            if built is not None:
                name = model if isinstance(model, str) else type(built).__name__
                yield from suite.model(f"model {name}", built, in_shape, classes)


@dataclass(frozen=True)
class _Suite:
    """The checks of one dtype on one device."""

    device: torch.device
    dtype: torch.dtype

    def linear(self) -> Iterator[Check]:
        for m, k, n in LINEAR:
            x, w, b = self._randn(m, k), self._randn(n, k) / k**0.5, self._randn(n)
            grad = self._randn(m, n)
            wide = [t.double() for t in (x, w, b, grad)]
            for activation in ACTIVATIONS:
                op = "linear" if activation == "none" else f"linear + {activation}"
                ours = _linear(functional.linear, activation, x, w, b, grad)
                theirs = _linear(_torch_linear, activation, x, w, b, grad)
                exact = _linear(_torch_linear, activation, *wide)
                yield from self._compare(op, (m, k, n), ours, theirs, exact)

    def loss(self) -> Iterator[Check]:
        for rows, classes in LOSS:
            logits = 3 * self._randn(rows, classes)
            a, b = torch.randint(classes, (2, rows)).to(self.device)
            lam = torch.rand(rows).to(self.device)
            options = {"target_b": b, "lam": lam, "label_smoothing": 0.1, "grad_scale": SCALE}
            ours = _loss(functional.cross_entropy, logits, a, **options)
            theirs, exact = (_loss(_torch_loss, z, a, b, lam) for z in (logits, logits.double()))
            yield from self._compare("mixup + smoothing loss", (rows, classes), ours, theirs, exact)

    def confident(self) -> Iterator[Check]:
        """The gradient at the true class where softmax is close to 1: errors of single values.

        It is a small difference of numbers near 1: taken in 16 bits nothing of it is right.
        """
        for rows, classes in LOSS:
            z, y = torch.randn(rows, classes), torch.randint(classes, (rows, 1))
            p = torch.tensor(CONFIDENT).repeat(rows)[:rows, None]
            rest = z.scatter(1, y, -math.inf).logsumexp(1, keepdim=True)
            z, y = z.scatter(1, y, rest + p.logit()).to(self.device, self.dtype), y.to(self.device)
            kinds = (
                (functional.cross_entropy, z),
                (F.cross_entropy, z),
                (F.cross_entropy, z.double()),
            )
            ours, theirs, exact = (
                _loss(f, logits, y[:, 0])["gradient"].gather(1, y).double() for f, logits in kinds
            )
            error, torch_error = (float(((g - exact) / exact).abs().max()) for g in (ours, theirs))
            limit = CONFIDENT_LIMIT[self.dtype]
            name = "gradient of the true class"
            shape = (rows, classes)
            yield Check("confident loss", name, shape, self.dtype, error, torch_error, limit)

    def mix(self) -> Iterator[Check]:
        for shape in MIX:
            images = torch.randint(256, shape, dtype=torch.uint8).to(self.device)
            lam, index = torch.rand(shape[0]).to(self.device), torch.randperm(shape[0])
            index = index.to(self.device)
            mean, std = (torch.rand(shape[1]).to(self.device) + 0.1 for _ in range(2))
            ours = functional.mix(images, lam, index, mean=mean, std=std, dtype=self.dtype)
            theirs, exact = (
                _torch_mix(images.to(dtype), lam, index, mean, std)
                for dtype in (self.dtype, torch.float64)
            )
            yield from self._compare("mixup + normalise", shape, {"images": ours}, theirs, exact)

    def optimizers(self) -> Iterator[Check]:
        """20 steps; torch gets fp32 masters and the same gradients, widened. torch has no Lion."""
        weights = self._weights()
        grads = [self._weights() for _ in range(STEPS)]
        dtypes = (self.dtype, torch.float32, torch.float64)
        for name in ("AdamW", "Adam", "SGD"):
            ours, theirs = getattr(optim, name), getattr(torch.optim, name)
            options = {"lr": 0.01, "weight_decay": 0.1}
            options |= {"momentum": 0.9} if name == "SGD" else {}
            results = (
                _steps(kind, options, [w.to(dtype) for w in weights], grads)
                for kind, dtype in zip((ours, theirs, theirs), dtypes, strict=True)
            )
            shape = (sum(w.numel() for w in weights),)
            yield from self._compare(f"{name}, {STEPS} steps, clip", shape, *results)

    def overflow(self) -> Check:
        """The number of values that a step with one infinite gradient changes."""
        params = [w.requires_grad_() for w in self._weights()]
        optimizer = optim.AdamW(params, lr=0.01)

        def step(last: float) -> list[Tensor]:
            for param in params:
                param.grad = torch.ones_like(param)
            assert params[-1].grad is not None
            params[-1].grad.view(-1)[-1] = last
            optimizer.step()
            state = [v for p in params for v in optimizer.state[p].values()]
            return [t.detach().clone() for t in (*params, *state)]

        before, after = step(1.0), step(math.inf)
        changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
        changed += int(optimizer.found_inf) != 1
        shape = (sum(p.numel() for p in params),)
        return Check("an overflow changes nothing", "count", shape, self.dtype, changed, None, 0.0)

    def model(
        self, op: str, model: nn.Module, in_shape: models.Shape, classes: int
    ) -> Iterator[Check]:
        """Loss and all gradients of one batch, against the same model in torch's ``.to(dtype)``."""
        x, y = self._randn(16, *in_shape), torch.randint(classes, (16,)).to(self.device)
        ours, theirs, wide = (copy.deepcopy(model).to(self.device) for _ in range(3))
        wide = wide.to(self.dtype).double()  # the same weights, rounded to the dtype
        yield from self._compare(
            op,
            tuple(x.shape),
            _backward(amp.convert(ours, self.dtype), x, y, functional.cross_entropy),
            _backward(theirs.to(self.dtype), x, y, F.cross_entropy),
            _backward(wide, x.double(), y, F.cross_entropy),
        )

    def _randn(self, *shape: int) -> Tensor:
        """Normal numbers, drawn on the CPU so that every device gets the same ones."""
        return torch.randn(shape).to(self.device, self.dtype)

    def _weights(self) -> list[Tensor]:
        return [self._randn(*shape) for shape in WEIGHTS]

    def _compare(
        self, op: str, shape: tuple[int, ...], ours: Values, theirs: Values, exact: Values
    ) -> Iterator[Check]:
        for name, reference in exact.items():
            error, torch_error = (_error(side[name], reference) for side in (ours, theirs))
            allowed = 3 if name in _SUMS else 2
            # torch's fp16 loss of 32,003 classes times the loss scale is inf: then one rounding
            bound = (
                allowed * torch_error if math.isfinite(torch_error) else torch.finfo(self.dtype).eps
            )
            limit = max(bound, _MIN_LIMIT)
            yield Check(op, name, shape, self.dtype, error, torch_error, limit)


def _error(value: Tensor, reference: Tensor) -> float:
    scale = max(float(reference.abs().max()), torch.finfo(torch.float32).tiny)
    return float((value.double() - reference).abs().max()) / scale


# ---- torch's side, and results by name ----


def _torch_linear(x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
    return activate(F.linear(x, w, b), activation)


def _linear(layer: Callable[..., Tensor], activation: str, *tensors: Tensor) -> Values:
    *leaves, grad = (t.detach().clone() for t in tensors)
    y = layer(*(t.requires_grad_() for t in leaves), activation)
    dx, dw, db = torch.autograd.grad(y, leaves, grad)
    return {"y": y.detach(), "dx": dx, "dW": dw, "db": db}


def _torch_loss(logits: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    one, two = (F.cross_entropy(logits, y, label_smoothing=0.1, reduction="none") for y in (a, b))
    return (lam.to(one) * one + (1 - lam.to(one)) * two).mean()


def _loss(loss: Callable[..., Tensor], logits: Tensor, *targets: Any, **options: Any) -> Values:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, *targets, **options)
    (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, SCALE))
    return {"loss": value.detach(), "gradient": grad}


def _torch_mix(images: Tensor, lam: Tensor, index: Tensor, mean: Tensor, std: Tensor) -> Values:
    lam, mean, std = (t.to(images)[:, None, None] for t in (lam, mean, std))
    x = (images / 255 - mean) / std
    return {"images": lam[:, None] * x + (1 - lam[:, None]) * x[index]}


def _steps(
    kind: Callable[..., torch.optim.Optimizer],
    options: dict[str, float],
    weights: list[Tensor],
    grads: list[list[Tensor]],
) -> Values:
    params = [w.clone().requires_grad_() for w in weights]
    ours = isinstance(kind, type) and issubclass(kind, FusedOptimizer)
    optimizer = kind(params, **options, **({"max_grad_norm": 1.0} if ours else {}))
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.to(param.dtype)
        if not ours:
            nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    exact = (
        optimizer.masters()
        if isinstance(optimizer, FusedOptimizer)
        else [p.detach() for p in params]
    )
    return {"masters": torch.cat([t.flatten() for t in exact])}


def _backward(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> Values:
    torch.manual_seed(0)  # of dropout
    value = loss(model(x), y)
    (value * SCALE).backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return {"loss": value.detach(), "gradients": torch.cat(grads)}
