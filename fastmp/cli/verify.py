"""``fastmp verify``: the numerics, checked on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from fastmp import doctor, recipe, verification
from fastmp.recipe import DTYPES, TrainConfig
from fastmp.recipe.config import COUNT, SEED
from fastmp.verification import Check


class VerificationFailed(Exception):
    """An error is larger than its limit."""


@dataclass(frozen=True)
class Verify:
    """Check every operation against fp64 and against torch, on this machine."""

    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto: cuda if there is one."""

    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
    """Types of the values."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Also check a model: mlp, convnet, vit, or package.module:factory."""

    in_shape: tuple[int, int, int] = (1, 28, 28)
    """Channels, height and width of the model's images."""

    classes: int = 10
    """Classes of the model."""

    seed: int = 0
    """Seed of the random values."""

    every: bool = False
    """Print every value, not only the one nearest its limit of each operation, shape and type."""


def main(arguments: Sequence[str]) -> None:
    """Check every operation against fp64 and against torch, on this machine."""
    run(tyro.cli(Verify, prog="fastmp verify", args=arguments))


def run(given: Verify) -> None:
    """Print the table.

    Raises:
        ConfigError: an argument out of its range.
        VerificationFailed: an error is larger than its limit.
    """
    SEED.check("seed", given.seed)
    for name, value in (("classes", given.classes), *(("in_shape", n) for n in given.in_shape)):
        COUNT.check(name, value)
    device = recipe.device_of(TrainConfig(device=given.device))
    dtypes = [DTYPES[name] for name in given.dtypes]
    found = verification.checks(
        device, dtypes, given.model, given.in_shape, given.classes, given.seed
    )
    done = list(tqdm(found, desc="verify", unit=" checks", leave=False, disable=None))
    print(f"on {doctor.device_name(device)}, errors relative to the largest value\n")
    print(table(done if given.every else closest(done)))
    failed = [check for check in done if not check.passed]
    print(f"\n{len(done) - len(failed)} of {len(done)} checks passed", file=sys.stdout)
    if failed:
        worst = failed[0]
        raise VerificationFailed(
            f"{len(failed)} checks failed, the first of them {worst.op}, {worst.value}, "
            f"{worst.dtype}: please report this with the output of `fastmp doctor`"
        )


def closest(checks: Iterable[Check]) -> list[Check]:
    """Of each operation, shape and dtype the value nearest to its limit, or beyond it."""
    nearest: dict[tuple[str, tuple[int, ...], torch.dtype], Check] = {}
    for check in checks:
        key = (check.op, check.shape, check.dtype)
        if key not in nearest or _fraction(check) > _fraction(nearest[key]):
            nearest[key] = check
    return list(nearest.values())


def _fraction(check: Check) -> float:
    """The error as a fraction of its limit; infinite for a check that failed."""
    if check.passed:
        return check.error / check.limit if check.limit else 0.0
    return float("inf")


def table(checks: Iterable[Check]) -> str:
    """The checks in columns."""
    rows = [("operation", "value", "shape", "dtype", "error", "torch's", "ratio", "")]
    for check in checks:
        name = next(name for name, dtype in DTYPES.items() if dtype == check.dtype)
        theirs = "" if check.torch_error is None else f"{check.torch_error:.1e}"
        ratio = "" if check.ratio is None else f"{check.ratio:.2f}"
        shape = " x ".join(map(str, check.shape))
        verdict = "ok" if check.passed else "FAILED"
        rows.append(
            (check.op, check.value, shape, name, f"{check.error:.1e}", theirs, ratio, verdict)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
