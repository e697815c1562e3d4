"""The optimizer step: the update alone, and with everything that AMP does around it.

Bytes a parameter (csrc/cpu/update.cpp, csrc/cuda/update.cu): fp32 weights 32, fp16 weights with
fp32 masters 32, bf16 weights with split masters 28. Every candidate takes as many steps from the
same start and must come to the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import fastmp
from fastmp.bench import networks, optimizer_state, third_party
from fastmp.bench.clocks import CLOCKS, Prepared, Run, kernel_clock
from fastmp.bench.harness import OURS, Case, Row, dtype_name, timed
from fastmp.bench.rounding import LR, check

MAX_NORM = 1.0
SCALE = 2.0**10
SECONDS = {"cpu": 4.0, "cuda": 1.0}
BYTES = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 28}  # a parameter
Shapes = Sequence[tuple[int, ...]]
Make = Callable[[list[Tensor]], torch.optim.Optimizer]

MANY: Shapes = [(1024,)] * 1000
BLOCKS: Shapes = [(500_000,)] * 50
LARGE: Shapes = [(4096, 4096)] * 6 + [(1024, 1024)] * 4  # 105 M
SERIES = "whole step, float16"


def resnet50() -> Shapes:
    """ResNet-50's 161 tensors, 25.6 M parameters."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in networks.resnet50((3, 224, 224), 1000).parameters()]


def size_of(shapes: Shapes) -> int:
    """Number of parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def parameters(shapes: Shapes, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Parameters with gradients, random normal; the same at every call."""
    generator = torch.Generator(device).manual_seed(1)
    params = []
    for shape in shapes:
        values = torch.randn((2, *shape), generator=generator, device=device)
        params.append(values[0].to(dtype).requires_grad_())
        params[-1].grad = (values[1] * 1e-3).to(dtype)
    return params


def update_alone(
    shapes: Shapes,
    label: str,
    device: str,
    seconds: float,
    *,
    checked: bool,
    goal: float,
    compiled: bool = False,
) -> list[Row]:
    """fp32 parameters, step() alone; checked: with the overflow check."""
    kinds: dict[str, Make] = {
        OURS: lambda p: fastmp.optim.AdamW(p, lr=LR, skip_nonfinite=checked),
        "AdamW(fused=True)": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
        "AdamW(foreach=True)": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True),
    }
    models = {name: parameters(shapes, torch.float32, device) for name in kinds}
    made = {name: kinds[name](params) for name, params in models.items()}
    steps: dict[str, Run] = {name: optimizer.step for name, optimizer in made.items()}
    if compiled:
        models["torch.compile"] = parameters(shapes, torch.float32, device)
        lr = torch.tensor(LR)  # a number would be a constant of the compiled code
        steps["torch.compile"] = torch.compile(torch.optim.AdamW(models["torch.compile"], lr).step)
    label = f"update alone, fp32, {label}" + (", overflow check" if checked else "")
    timings = timed(steps, seconds, label, kernel_clock(device))
    weights = {name: [p.detach() for p in params] for name, params in models.items()}
    ours = made[OURS]
    assert isinstance(ours, fastmp.optim.AdamW)
    check(weights, int(ours.applied_steps))
    moved = (32 if checked else 28) * size_of(shapes)
    notes = "torch's optimizers do not check" if checked else ""
    return [
        Row("optimizer", label, timings, moved, {"best": goal}, notes=notes, clock=CLOCKS[device])
    ]


def clipped_step(
    shapes: Shapes, dtype: torch.dtype, device: str, seconds: float, *, master: str | None = None
) -> list[Row]:
    """One launch with check and clip against a copy; the others neither check nor clip."""
    weights = parameters(shapes, dtype, device)
    optimizer = fastmp.optim.AdamW(weights, lr=LR, max_grad_norm=MAX_NORM, master=master)
    exact = [p.detach().float().requires_grad_() for p in weights]
    for p, w in zip(exact, weights, strict=True):
        assert w.grad is not None
        p.grad = w.grad.float()
    theirs = torch.optim.AdamW(exact, lr=LR, fused=True)
    torch.nn.utils.clip_grad_norm_(exact, MAX_NORM)
    runs: dict[str, Run] = {OURS: optimizer.step, "AdamW(fused=True), fp32": theirs.step}
    libraries = third_party.optimizers(device, LR) if dtype != torch.float32 else {}
    others = third_party.working(
        {
            name: library.call(parameters(shapes, dtype, device)).step
            for name, library in libraries.items()
        }
    )
    kind = dtype_name(dtype) + (" split" if master else "")
    label = f"step with clip, {kind}, {size_of(shapes) / 1e6:.0f} M"
    goals = {"FlashOptim, fp32 state": 1.0} if master and "FlashOptim, fp32 state" in others else {}
    moved = 28 if master else BYTES[dtype]
    timings = timed(runs | others, seconds, label, kernel_clock(device))
    found = {OURS: optimizer.masters(), "torch": [p.detach() for p in exact]}
    check(found, int(optimizer.applied_steps))
    return [
        Row(
            "optimizer", label, timings, moved * size_of(shapes), goals,
            copy_fraction=0.92, clock=CLOCKS[device],
            notes="the others neither check the gradients nor clip",
            not_comparable=[name for name in others if not libraries[name].comparable],
        )
    ]  # fmt: skip


class TorchPipeline:
    """PyTorch's step of 16-bit weights with fp32 masters, each part in its fastest form.

    ``make`` makes the optimizers of the masters.
    """

    def __init__(
        self,
        weights: list[Tensor],
        make: Callable[[list[Tensor]], list[torch.optim.Optimizer]],
    ) -> None:
        self.weights = weights
        device = weights[0].device
        self.masters = [p.detach().float().requires_grad_() for p in self.weights]
        self.grads = [torch.empty_like(p) for p in self.masters]
        self.optimizers = make(self.masters)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
        self.scaler.scale(torch.ones((), device=device))

    @torch.no_grad()
    def step(self) -> None:
        """Cast, unscale, clip, update, cast back."""
        torch._foreach_copy_(self.grads, [p.grad for p in self.weights if p.grad is not None])
        for p, grad in zip(self.masters, self.grads, strict=True):
            p.grad = grad
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.masters, MAX_NORM)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        torch._foreach_copy_(self.weights, self.masters)


class FastmpPipeline:
    """The same work."""

    def __init__(self, weights: list[Tensor]):
        self.weights = weights
        device = weights[0].device
        self.optimizer = fastmp.optim.AdamW(self.weights, lr=LR, max_grad_norm=MAX_NORM)
        self.scaler = fastmp.amp.GradScaler(device.type, init_scale=SCALE)
        self.scaler.scale(torch.ones((), device=device))

    def step(self) -> None:
        """One fused step."""
        self.scaler.step(self.optimizer)
        self.scaler.update()


def whole_step(
    shapes: Shapes,
    label: str,
    dtype: torch.dtype,
    device: str,
    seconds: float,
    *,
    goal: float | None = None,
    copy_fraction: float = 0.0,
) -> list[Row]:
    """Unscale, overflow check, clip, AdamW, 16-bit weights; torch's parts move 60 bytes."""
    ours = FastmpPipeline(parameters(shapes, dtype, device))
    theirs = TorchPipeline(
        parameters(shapes, dtype, device),
        lambda masters: [torch.optim.AdamW(masters, lr=LR, fused=True)],
    )
    label = f"whole step, {dtype_name(dtype)}, {label}"
    runs: dict[str, Run] = {OURS: ours.step, "GradScaler + fused": theirs.step}
    timings = timed(runs, seconds, label, kernel_clock(device))
    expected = [p.detach() for p in theirs.masters]
    found = {OURS: ours.optimizer.masters(), "GradScaler + fused": expected}
    check(found, int(ours.optimizer.applied_steps))
    goals = {} if goal is None else {"best": goal}
    series = SERIES if dtype == torch.float16 else ""
    moved = BYTES[dtype] * size_of(shapes)
    return [
        Row(
            "optimizer", label, timings, moved, goals,
            copy_fraction=copy_fraction, series=series, clock=CLOCKS[device],
        )
    ]  # fmt: skip


def on_the_host(tensors: int, changed: bool, limit: float = 0.0) -> list[Row]:
    """Small tensors: until step() returns the host takes longer than the device.

    ``limit``: milliseconds of ours, at most.
    """

    def candidate(make: Make) -> Prepared:
        params = parameters([(256,)] * tensors, torch.float32, "cuda")
        sets = [[p.grad for p in params] for _ in range(2)]
        if changed:
            sets[1] = [torch.randn_like(p) for p in params]

        def swap() -> None:
            sets.reverse()
            for p, grad in zip(params, sets[0], strict=True):
                p.grad = grad

        return Prepared(swap, make(params).step)

    runs: dict[str, Run] = {
        OURS: candidate(lambda p: fastmp.optim.AdamW(p, lr=LR)),
        "AdamW(fused=True)": candidate(lambda p: torch.optim.AdamW(p, lr=LR, fused=True)),
    }
    label = f"step of {tensors} tensors, gradients {'changed' if changed else 'the same'}"
    timings = timed(runs, SECONDS["cuda"], label, kernel_clock("cuda"))
    goals = {"best": 1.0}
    return [Row("optimizer", label, timings, host_goals=goals, host_limit=limit, clock="device")]


def cases(device: str, quick: bool) -> list[Case]:
    """Every case of this subject."""
    seconds = 0.3 if quick else SECONDS[device]
    fp16, bf16 = torch.float16, torch.bfloat16
    found: list[Case] = []

    def add(
        name: str, make: Callable[..., list[Row]], *arguments: object, **options: object
    ) -> None:
        found.append(Case(name, partial(make, *arguments, device, seconds, **options)))

    def add_states(shapes: Shapes, label: str, *dtypes: torch.dtype) -> None:
        def make(dtype: torch.dtype) -> list[Tensor]:
            return parameters(shapes, dtype, device)

        add(f"average {label}", optimizer_state.averaged_step, make, label)
        for dtype in dtypes:
            name = f"moments {dtype} {label}"
            add(name, optimizer_state.narrow_moments, make, dtype, label)

    for size in (1_000, 5_000) if quick else (2_000, 20_000, 100_000):
        name = f"50 x {size:,}"
        add(f"whole step {name}", whole_step, [(size,)] * 50, name, fp16)
    if quick:
        return found
    if device == "cuda":
        for dtype in BYTES:
            add(f"step with clip {dtype}", clipped_step, LARGE, dtype)
        add("step with clip, fp16 split", clipped_step, LARGE, fp16, master="split")
        # where bytes are the bound, the rate of a copy; 1,000 launches are the bound of the last
        for name, shapes, goal, fraction in (
            ("105 M", LARGE, 2.0, 0.9),
            ("ResNet-50", resnet50(), None, 0.85),
            ("1000 x 1,024", MANY, 5.0, 0.0),
        ):
            goals = {"goal": goal, "copy_fraction": fraction}
            add(f"whole step {name}", whole_step, shapes, name, fp16, **goals)
        add_states(LARGE, "105 M", torch.bfloat16, torch.float32)
        for count, changed, limit in ((500, True, 0.0), (500, False, 0.0), (161, True, 0.12)):
            name = f"host, {count}, changed: {changed}"
            found.append(Case(name, partial(on_the_host, count, changed, limit)))
        return found
    name = "50 x 500,000"
    add(f"whole step {name}", whole_step, BLOCKS, name, fp16, goal=2.0)
    add(f"whole step {name}, bf16", whole_step, BLOCKS, name, bf16)
    for checked in (False, True):  # not compiled: that unrolls the list and takes minutes
        options = {"checked": checked, "goal": 3.0}
        add(f"many, checked: {checked}", update_alone, MANY, "1000 x 1,024", **options)
    add_states(BLOCKS, name, torch.float32, torch.bfloat16)
    # torch.compile last: what it loads slows every later call from Python
    add("large, checked", update_alone, BLOCKS, name, checked=True, goal=0.95)
    add("large", update_alone, BLOCKS, name, checked=False, goal=0.95, compiled=True)
    return found
