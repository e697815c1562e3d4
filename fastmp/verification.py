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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmp import amp, functional, models, optim
from fastmp.ops.linear import activate
from fastmp.optim.base import Fused

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "gelu", "silu")
LINEAR = ((256, 1024, 512), (33, 130, 65))  # rows, in, out features: a kernel's, an odd one
LOSS = ((256, 10), (64, 1000), (8, 32003))  # rows, classes
MIX = ((64, 3, 32, 32), (7, 1, 28, 28))
WEIGHTS = ((256, 129), (1000,), (3,))
STEPS = 20
_FLOOR = 4 * torch.finfo(torch.float32).eps  # an error that is no error, whatever torch's is

Values = dict[str, Tensor]  # what an operation gives, by name
_SUMS = ("dW", "db")  # over the batch


@dataclass(frozen=True)
class Check:
    """One value of one operation; errors are relative to the largest entry of the reference.

    ``torch_error`` is None where torch has nothing to compare with, and ``limit`` is what ``error``
    may be at most.
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
        """Whether the error is within the limit; one that is no number is not."""
        return self.error <= self.limit


def verify(
    device: str | torch.device = "cpu",
    dtypes: Sequence[torch.dtype] = DTYPES,
    model: str | Callable[[models.Shape, int], nn.Module] | None = None,
    in_shape: models.Shape = (1, 28, 28),
    classes: int = 10,
    seed: int = 0,
) -> list[Check]:
    """Check every operation, and a model if one is given.

    Args:
        device: where.
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
    device: str | torch.device = "cpu",
    dtypes: Sequence[torch.dtype] = DTYPES,
    model: str | Callable[[models.Shape, int], nn.Module] | None = None,
    in_shape: models.Shape = (1, 28, 28),
    classes: int = 10,
    seed: int = 0,
) -> Iterator[Check]:
    """As ``verify``, one by one as they are done."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(model, str):
            made: nn.Module | None = models.build(model, in_shape, classes)
        else:
            made = None if model is None else model(in_shape, classes)
        for dtype in dtypes:
            place = torch.empty((), device=device, dtype=dtype)
            yield from _linear(place)
            yield from _loss(place)
            yield from _mix(place)
            yield from _optimizers(place)
            yield from _overflow(place)
            if made is not None:
                name = model if isinstance(model, str) else type(made).__name__
                yield from _model(f"model {name}", made, place, in_shape, classes)


def _compared(
    op: str, shape: tuple[int, ...], place: Tensor, ours: Values, torchs: Values, exact: Values
) -> Iterator[Check]:
    for name, reference in exact.items():
        error, theirs = (_error(side[name], reference) for side in (ours, torchs))
        allowed = 3 if name in _SUMS else 2
        # a loss of 32,003 classes times the loss scale is inf in torch's fp16: then one rounding
        bound = allowed * theirs if math.isfinite(theirs) else torch.finfo(place.dtype).eps
        limit = max(bound, _FLOOR)
        yield Check(op, name, shape, place.dtype, error, theirs, limit)


def _error(value: Tensor, reference: Tensor) -> float:
    scale = max(float(reference.abs().max()), torch.finfo(torch.float32).tiny)
    return float((value.double() - reference).abs().max()) / scale


def _random(place: Tensor, *shape: int) -> Tensor:
    """Normal numbers, drawn on the CPU so that every device gets the same ones."""
    return torch.randn(shape).to(place)


# ---- the operations ----


def _linear(place: Tensor) -> Iterator[Check]:
    for rows, depth, columns in LINEAR:
        x, w, b, grad = (
            _random(place, rows, depth),
            _random(place, columns, depth) / depth**0.5,
            _random(place, columns),
            _random(place, rows, columns),
        )
        for activation in ACTIVATIONS:

            def torchs(x: Tensor, w: Tensor, b: Tensor, activation: str = activation) -> Tensor:
                return activate(F.linear(x, w, b), activation)

            def ours(x: Tensor, w: Tensor, b: Tensor, activation: str = activation) -> Tensor:
                return functional.linear(x, w, b, activation)

            mine, theirs = (_derived(f, grad, x, w, b) for f in (ours, torchs))
            wide = [t.double() for t in (grad, x, w, b)]
            op = "linear" if activation == "none" else f"linear + {activation}"
            exact = _derived(torchs, *wide)
            yield from _compared(op, (rows, depth, columns), place, mine, theirs, exact)


def _derived(layer: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> Values:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = layer(*leaves)
    names = ("dx", "dW", "db")
    grads = torch.autograd.grad(y, leaves, grad)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def _loss(place: Tensor) -> Iterator[Check]:
    for rows, classes in LOSS:
        logits = 3 * _random(place, rows, classes)
        a, b = torch.randint(classes, (2, rows)).to(place.device)
        lam = torch.rand(rows).to(place.device)

        def torchs(logits: Tensor, a: Tensor = a, b: Tensor = b, lam: Tensor = lam) -> Tensor:
            one, two = (
                F.cross_entropy(logits, y, label_smoothing=0.1, reduction="none") for y in (a, b)
            )
            return (lam.to(one) * one + (1 - lam.to(one)) * two).mean()

        def ours(logits: Tensor, a: Tensor = a, b: Tensor = b, lam: Tensor = lam) -> Tensor:
            return functional.cross_entropy(
                logits, a, label_smoothing=0.1, target_b=b, lam=lam, grad_scale=1024.0
            )

        mine, theirs = (_loss_and_gradient(f, logits) for f in (ours, torchs))
        exact = _loss_and_gradient(torchs, logits.double())
        yield from _compared("mixup + smoothing loss", (rows, classes), place, mine, theirs, exact)


def _loss_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Values:
    """With the loss scale 1024, so that fp16 gradients are not all subnormal."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, 1024.0))
    return {"loss": value.detach(), "gradient": grad}


def _mix(place: Tensor) -> Iterator[Check]:
    for shape in MIX:
        images = torch.randint(256, shape, dtype=torch.uint8).to(place.device)
        lam, index = torch.rand(shape[0]).to(place.device), torch.randperm(shape[0])
        index = index.to(place.device)
        mean, std = (torch.rand(shape[1]).to(place.device) + 0.1 for _ in range(2))

        def torchs(
            to: torch.dtype,
            images: Tensor = images,
            lam: Tensor = lam,
            index: Tensor = index,
            mean: Tensor = mean,
            std: Tensor = std,
        ) -> Values:
            share = lam.to(to)[:, None, None, None]
            x = images.to(to) / 255
            x = (x - mean.to(to)[:, None, None]) / std.to(to)[:, None, None]
            return {"images": share * x + (1 - share) * x[index]}

        mixed = functional.mix(images, lam, index, mean=mean, std=std, dtype=place.dtype)
        sides = ({"images": mixed}, torchs(place.dtype))
        yield from _compared("mixup + normalise", shape, place, *sides, torchs(torch.float64))


# ---- the optimizers ----


def _optimizers(place: Tensor) -> Iterator[Check]:
    """Twenty steps; torch gets fp32 masters and the same gradients, widened. torch has no Lion."""
    kinds: list[tuple[str, Callable[..., Fused], Callable[..., torch.optim.Optimizer]]] = [
        ("AdamW", optim.AdamW, torch.optim.AdamW),
        ("Adam", optim.Adam, torch.optim.Adam),
        ("SGD", optim.SGD, torch.optim.SGD),
    ]
    weights = [_random(place, *shape) for shape in WEIGHTS]
    grads = [[_random(place, *shape) for shape in WEIGHTS] for _ in range(STEPS)]
    for name, ours, torchs in kinds:
        options = {"lr": 0.01, "weight_decay": 0.1}
        options |= {"momentum": 0.9} if name == "SGD" else {}
        sides = [
            _stepped(kind, options, [w.to(dtype) for w in weights], grads)
            for kind, dtype in (
                (ours, place.dtype),
                (torchs, torch.float32),
                (torchs, torch.float64),
            )
        ]
        shape = (sum(w.numel() for w in weights),)
        yield from _compared(f"{name}, {STEPS} steps, clip", shape, place, *sides)


def _stepped(
    kind: Callable[..., torch.optim.Optimizer],
    options: dict[str, float],
    weights: list[Tensor],
    grads: list[list[Tensor]],
) -> Values:
    params = [w.clone().requires_grad_() for w in weights]
    is_ours = issubclass(kind, Fused) if isinstance(kind, type) else False
    optimizer = kind(params, **options, **({"max_grad_norm": 1.0} if is_ours else {}))
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.to(param.dtype)
        if not is_ours:
            nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    exact = optimizer.masters() if isinstance(optimizer, Fused) else [p.detach() for p in params]
    return {"masters": torch.cat([t.flatten() for t in exact])}


def _overflow(place: Tensor) -> Iterator[Check]:
    """After a step with one infinite gradient: how many numbers are not bitwise what they were."""
    params = [_random(place, *shape).requires_grad_() for shape in WEIGHTS]
    optimizer = optim.AdamW(params, lr=0.01)

    def step(last: float) -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        assert params[-1].grad is not None
        params[-1].grad.view(-1)[-1] = last
        optimizer.step()

    def numbers() -> list[Tensor]:
        kept = [v for p in params for v in optimizer.state[p].values()]
        return [t.detach().clone() for t in (*params, *kept)]

    step(1.0)
    before = numbers()
    step(math.inf)
    changed = sum(int((a != b).sum()) for a, b in zip(before, numbers(), strict=True))
    changed += int(optimizer.found_inf) != 1
    shape = (sum(p.numel() for p in params),)
    yield Check("an overflow changes nothing", "count", shape, place.dtype, changed, None, 0.0)


# ---- a model ----


def _model(
    op: str, model: nn.Module, place: Tensor, in_shape: models.Shape, classes: int
) -> Iterator[Check]:
    """Loss and all gradients of one batch, against the same model in torch's ``.to(dtype)``."""
    x, y = _random(place, 16, *in_shape), torch.randint(classes, (16,)).to(place.device)
    twins = [copy.deepcopy(model).to(place.device) for _ in range(3)]
    ours = _trained(amp.convert(twins[0], place.dtype), x, y, functional.cross_entropy)
    torchs = _trained(twins[1].to(place.dtype), x, y, F.cross_entropy)
    rounded = twins[2].to(place.dtype).double()  # the weights that both of them had
    exact = _trained(rounded, x.double(), y, F.cross_entropy)
    yield from _compared(op, tuple(x.shape), place, ours, torchs, exact)


def _trained(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> Values:
    torch.manual_seed(0)  # of dropout
    value = loss(model(x), y)
    (value * 1024).backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return {"loss": value.detach(), "gradients": torch.cat(grads)}
