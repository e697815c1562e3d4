"""Tile choices, tried on the device: the rows of ``tiles.py`` to change, and their new tiles.

    python -m benchmarks.tools.tune [--seconds 90] [--small]

Every candidate differs from the present tile in a field or two and is timed against it,
interleaved, on all shapes of its row, after its result was compared with torch's. One that does not
fit on the device is skipped. ``--small`` runs two candidates on tiny shapes in Triton's
interpreter, to test the procedure.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmp.backends import triton as devices
from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.cuda import loss as ring_loss
from fastmp.backends.cuda.loss import Ring, RingSize, ring_of
from fastmp.backends.triton.kernels import linear, loss
from fastmp.backends.triton.tiles import LinearTile, LossTile, linear_tile, loss_tile
from fastmp.bench.clocks import Measure, Run, kernel_clock
from fastmp.bench.harness import interleave

Check = Callable[[Any], None]  # of the result of a call; raises AssertionError
ROUNDS = 9
WORTH_IT = 1.03  # a smaller gain is noise

FEW, SHALLOW, DEEP = (16, 4096, 4096), (16384, 1024, 4096), (8192, 8192, 8192)
LINEAR = {
    "small_m": [FEW, (64, 4096, 14336)],
    "short_k": [SHALLOW, (16384, 512, 2048), (65536, 512, 512)],
    "long_k": [DEEP, (4096, 4096, 14336)],
}
LOSS = [(131072, 10), (131072, 1000), (65536, 4096), (8192, 32000), (4096, 128256)]
RING = [(16384, 8192), (16384, 16384), (8192, 32000), (8192, 50257), (4096, 128256)]


@dataclass(frozen=True)
class Finding:
    """A row of tiles.py, the best candidate for it, and how much faster than the present tile."""

    row: str
    tile: tuple[Any, ...]
    ratio: float
    tried: int
    wrong: int = 0  # candidates with wrong results

    def __str__(self) -> str:
        change = "stays" if self.ratio < WORTH_IT else f"-> {self.tile}, {self.ratio:.2f}x"
        return f"{self.row}: {change} ({self.tried} tried)"


@contextmanager
def using(module: ModuleType, name: str, tile: tuple[Any, ...]) -> Iterator[None]:
    """In the block the kernels of ``module`` take this tile."""
    usual = getattr(module, name)
    setattr(module, name, lambda *_: tile)
    try:
        yield
    finally:
        setattr(module, name, usual)


def best(
    row: str,
    module: ModuleType,
    name: str,
    present: tuple[Any, ...],
    candidates: Sequence[tuple[Any, ...]],
    cases: Sequence[tuple[Run, Check]],
    deadline: float,
) -> Finding:
    """Time each candidate against the present tile on every case, until the deadline.

    Args:
        cases: calls with the checks of their results.
    """
    measure = kernel_clock("cuda" if torch.cuda.is_available() else "cpu")
    found, tried, wrong = Finding(row, present, 1.0, 0), 0, 0
    for tile in candidates:
        if time.perf_counter() > deadline:
            break
        tried += 1
        try:
            ratios = [_ratio(module, name, present, tile, *case, measure) for case in cases]
        except AssertionError as error:
            wrong += 1
            print(f"{row}: {tile} gives wrong results: {error}", file=sys.stderr)
            continue
        except Exception as error:  # one of Triton's many: shared memory, registers, a bad tile
            print(f"{row}: {tile} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        ratio = math.exp(sum(map(math.log, ratios)) / len(ratios))
        if ratio > found.ratio:
            found = Finding(row, tile, ratio, tried)
    return Finding(row, found.tile, found.ratio, tried, wrong)


def _ratio(
    module: ModuleType,
    name: str,
    present: tuple[Any, ...],
    tile: tuple[Any, ...],
    run: Run,
    check: Check,
    measure: Measure,
) -> float:
    def with_tile(tile: tuple[Any, ...]) -> Run:
        def call() -> object:
            with using(module, name, tile):
                return run()

        return call

    runs = {"present": with_tile(present), "candidate": with_tile(tile)}
    check(runs["candidate"]())
    timings = interleave(runs, ROUNDS, name, measure)
    return timings["present"].median / timings["candidate"].median


def _dtype(device: str) -> torch.dtype:
    """bf16; in the interpreter, which multiplies bf16 as if it were integers, fp16."""
    return torch.bfloat16 if device == "cuda" else torch.float16


# ---- linear ----


def linear_candidates(tile: LinearTile) -> list[LinearTile]:
    """Neighbours of a tile: another shape, number of stages, of warps or of programs."""
    shapes = {(64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128)}
    made = [tile._replace(block_m=m, block_n=n) for m, n in sorted(shapes)]
    made += [tile._replace(block_k=k) for k in (32, 64, 128)]
    made += [tile._replace(stages=tile.stages + more) for more in (-1, 1, 2)]
    made += [tile._replace(warps=w, programs_per_sm=p) for w in (4, 8) for p in (1, 2)]
    made += [tile._replace(tma=not tile.tma)] if tile.tma else []
    return [m for m in dict.fromkeys(made) if m != tile and m.stages > 0]


def linear_case(shape: tuple[int, int, int], device: str) -> tuple[Run, Check]:
    m, k, n = shape
    torch.manual_seed(0)
    x, w, b = (
        torch.randn(size, device=device, dtype=_dtype(device)) for size in ((m, k), (n, k), (n,))
    )
    w /= k**0.5

    def check(result: tuple[Tensor, Tensor]) -> None:
        last = slice(-64, None)
        exact = F.gelu(F.linear(x[last].double(), w.double(), b.double()))
        error = float((result[0][last] - exact).abs().max())
        assert error <= 2e-2 * float(exact.abs().max()), error

    return (lambda: linear.linear(x, w, b, "gelu", True)), check


def tune_linear(device: str, small: bool, deadline: float) -> Iterator[Finding]:
    architecture = devices.architecture(torch.device(device))
    for row, shapes in LINEAR.items():
        m, k, _ = shapes[0]
        tile = linear_tile(m, k, architecture)
        if small:
            shapes, candidates = [(33, 40, 24)], linear_candidates(tile)[:2]
        else:
            candidates = linear_candidates(tile)
        cases = [linear_case(shape, device) for shape in shapes]
        name = f"linear, {architecture}, {row}"
        yield best(name, linear, "linear_tile", tile, candidates, cases, deadline)


# ---- loss ----


def loss_candidates(tile: LossTile) -> list[LossTile]:
    """Neighbours of a tile: other numbers of warps, of programs and of logits at a time."""
    made = [tile._replace(warps=w) for w in (tile.warps // 2, tile.warps * 2) if 1 <= w <= 32]
    made += [tile._replace(programs=tile.programs + more) for more in (-2, -1, 1, 2)]
    if tile.rows > 1:
        made += [tile._replace(rows=tile.rows * 2), tile._replace(rows=tile.rows // 2)]
    if not tile.on_chip:
        made += [tile._replace(block=tile.block * 2), tile._replace(block=tile.block // 2)]
    return [m for m in made if m.programs > 0]


def loss_case(module: ModuleType, rows: int, classes: int, device: str) -> tuple[Run, Check]:
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device=device, dtype=_dtype(device))
    target = torch.randint(classes, (rows,), device=device)
    spec = LossSpec(target, None, None, None, -100, Reduction.MEAN, 0.1)
    scale = torch.ones((), device=device)

    def check(result: tuple[Tensor, Tensor, Tensor]) -> None:
        exact = F.cross_entropy(logits.float(), target, label_smoothing=0.1)
        torch.testing.assert_close(result[0], exact, rtol=1e-4, atol=1e-5)

    return lambda: module.forward(logits, scale, True, spec), check


def tune_loss(device: str, small: bool, deadline: float) -> Iterator[Finding]:
    for rows, classes in [(5, 40)] if small else LOSS:
        tile = loss_tile(classes)
        candidates = loss_candidates(tile)[: 2 if small else None]
        cases = [loss_case(loss, rows, classes, device)]
        name = f"loss, {classes} classes"
        yield best(name, loss, "loss_tile", tile, candidates, cases, deadline)


# ---- the ring ----


def ring_candidates(present: Ring, row_bytes: int, sm_shared: int) -> list[Ring]:
    """Other numbers of threads, of blocks and of vectors of a chunk for a thread."""
    shapes = [
        (64, 8),
        (128, 7),
        (128, 5),
        (256, 4),
        (256, 3),
        (256, 2),
        (512, 2),
        (512, 1),
        (768, 1),
    ]
    sizes = [
        RingSize(row_bytes, threads, cluster, blocks, each)
        for cluster in (1, 2)
        for threads, blocks in shapes
        for each in (1, 2)
    ]
    made = [ring_of(size, row_bytes, sm_shared) for size in sizes]
    same = present.size._replace(row_bytes=row_bytes)
    return [ring for ring in made if ring is not None and ring.size != same]


def tune_ring(device: str, deadline: float) -> Iterator[Finding]:
    """On a GPU with bulk copies."""
    shared = ring_loss.sm_shared(torch.device(device))
    for rows, classes in RING if shared else []:
        present = ring_loss.ring_for(2 * classes, shared)
        assert present is not None
        candidates = ring_candidates(present, 2 * classes, shared)
        cases = [loss_case(ring_loss, rows, classes, device)]
        name = f"ring, {classes} classes"
        yield best(name, ring_loss, "ring_for", present, candidates, cases, deadline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90, help="for all of it")
    parser.add_argument("--small", action="store_true", help="two candidates on tiny shapes")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        sys.exit("tiles are tuned on a GPU; --small tries the procedure in Triton's interpreter")
    start = time.perf_counter()
    first, second, end = (start + options.seconds * part / 3 for part in (1, 2, 3))
    wrong = 0
    for finding in chain(
        tune_linear(device, options.small, first),
        tune_loss(device, options.small, second),
        tune_ring(device, end) if device == "cuda" else (),
    ):
        print(finding, flush=True)
        wrong += finding.wrong
    if wrong:
        sys.exit(f"{wrong} tiles gave wrong results: a kernel is right for some tiles only")


if __name__ == "__main__":
    main()
