"""``fastmp verify``: the numerics, checked on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

import torch

from fastmp import verification
from fastmp.report import environment
from fastmp.verification import Check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class VerificationFailed(Exception):
    """An error is larger than its limit."""


class VerifyError(ValueError):
    """An argument out of its range."""


def parser() -> argparse.ArgumentParser:
    """The flags; argparse, since the numerics can be checked without the extra [train]."""
    found = argparse.ArgumentParser(prog="fastmp verify", description=main.__doc__)
    add = found.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="types of the values; default: all",
    )
    add(
        "--model", metavar="NAME", help="also a model: mlp, convnet, vit, or package.module:factory"
    )
    add(
        "--in-shape", nargs=3, type=int, default=[1, 28, 28], metavar=("C", "H", "W"),
        help="shape of the model's images; default: 1 28 28",
    )  # fmt: skip
    add("--classes", type=int, default=10, help="classes of the model; default: 10")
    add("--seed", type=int, default=0, help="seed of the random values; default: 0")
    add(
        "--every", action="store_true",
        help="print every value, not only the one nearest its limit of each operation and type",
    )  # fmt: skip
    return found


def main(arguments: Sequence[str]) -> None:
    """Check every operation against fp64 and torch, on this machine."""
    run(parser().parse_args(arguments))


def run(given: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        VerifyError: an argument out of its range.
        VerificationFailed: an error is larger than its limit.
    """
    counts = [("classes", given.classes), *(("in_shape", n) for n in given.in_shape)]
    for name, value in counts:
        if value < 1:
            raise VerifyError(f"{name}: expected a whole number of at least 1, got {value}")
    if not 0 <= given.seed < 2**63:
        raise VerifyError(f"seed: expected a whole number from 0 to 2**63 - 1, got {given.seed}")
    try:
        device = environment.working_device(given.device)
    except ValueError as error:
        raise VerifyError(f"device: {error}") from error
    dtypes = [DTYPES[name] for name in given.dtypes]
    found = verification.checks(
        device, dtypes, given.model, tuple(given.in_shape), given.classes, given.seed
    )
    done = list(_with_progress(found))
    print(f"on {environment.device_name(device)}, errors relative to the largest value\n")
    print(table(done if given.every else closest(done)))
    failed = [check for check in done if not check.passed]
    print(f"\n{len(done) - len(failed)} of {len(done)} checks passed", file=sys.stdout)
    if failed:
        worst, count = failed[0], f"{len(failed)} checks failed, the first of them"
        raise VerificationFailed(
            f"{'1 check failed,' if len(failed) == 1 else count} {worst.op}, {worst.value}, "
            f"{worst.dtype}: please report this with the output of `fastmp doctor`"
        )


def _with_progress(checks: Iterable[Check]) -> Iterable[Check]:
    """The checks, counted on a terminal where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return checks
    counted: Iterable[Check] = tqdm(
        checks, desc="verify", unit=" checks", leave=False, disable=None
    )
    return counted


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
