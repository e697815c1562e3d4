"""The results of a run, as ``fastmp train`` prints them and ``Trainer.fit`` returns them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastmp.backends import registry
from fastmp.training.progress import EpochResult

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Results(list[EpochResult]):
    """The epochs of a ``fit``, and the run in short: ``print(trainer.fit(...))``.

    Args:
        epochs: of this call.
        facts: of the whole run, by name; see ``facts``.
    """

    def __init__(self, epochs: Iterable[EpochResult] = (), facts: Mapping[str, str] = {}) -> None:
        super().__init__(epochs)
        self.facts = dict(facts)

    @property
    def best(self) -> EpochResult | None:
        """The epoch with the highest accuracy, the latest of several; None without validation."""
        validated = [e for e in self if e.val_accuracy is not None]
        return max(validated, key=lambda e: (e.val_accuracy, e.epoch), default=None)

    def __str__(self) -> str:
        return table(self.facts)


def facts(
    epochs: Sequence[Mapping[str, Any]], model: torch.nn.Module, skipped: int, steps: int
) -> dict[str, str]:
    """The run in short, the most important first.

    Args:
        epochs: of the run, with the names of ``EpochResult``.
        model: as it was trained.
        skipped: steps.
        steps: attempted, the skipped ones included.
    """
    found = {}
    seconds = sum(row["seconds"] for row in epochs)
    samples = sum(row["seconds"] * row["samples_per_second"] for row in epochs)
    count = "1 epoch" if len(epochs) == 1 else f"{len(epochs)} epochs"
    validated = [row for row in epochs if row["val_accuracy"] is not None]
    if validated:
        last, best = validated[-1], max(validated, key=lambda r: (r["val_accuracy"], r["epoch"]))
        found["val accuracy"] = f"{last['val_accuracy']:.2%} after {count}"
        if best["epoch"] != last["epoch"]:
            found["best epoch"] = f"{best['epoch']}, {best['val_accuracy']:.2%}"
    elif epochs:
        found["train loss"] = f"{_number(epochs[-1]['train_loss'])} after {count}"
    if epochs:
        found["training time"] = f"{seconds:.1f} s"
        found["speed"] = f"{samples / seconds:,.0f} samples/s"
    weights = list(model.parameters())
    dtypes = {w.dtype for w in weights}
    narrow = [_DTYPES[d] for d in (torch.bfloat16, torch.float16) if d in dtypes]
    found["weights"] = f"{narrow[0]}, fp32 masters" if narrow else "fp32"
    found["parameters"] = f"{sum(w.numel() for w in weights):,}"
    found["skipped steps"] = f"{skipped:,} of {steps:,}"
    device = weights[0].device
    found["peak memory"] = f"{_peak_memory(device) / 2**20:,.0f} MiB"
    found["kernels"] = _kernels(device.type)
    return found


def table(facts: Mapping[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, facts), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items())


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _kernels(device: str) -> str:
    """The backends of the device's operations, in one line."""
    by_backend: dict[str, list[str]] = {}
    for served in registry.report():
        if served.device == device:
            by_backend.setdefault(served.backend, []).append(served.op)
    if list(by_backend) == ["reference"]:
        return "none: plain PyTorch; fastmp doctor says why"
    parts = [f"{', '.join(ops)} ({backend})" for backend, ops in by_backend.items()]
    slow = "; fastmp doctor says why" if "reference" in by_backend else ""
    return ", ".join(parts) + slow


def _peak_memory(device: torch.device) -> int:
    """Bytes: the peak of the device's allocator, or on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
