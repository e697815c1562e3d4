"""Data parallel: the same batch on each of 1, 2, ... devices, and the time of a step.

On CPUs every process has one thread and gloo, on GPUs a device and NCCL. A step exchanges
2 (n-1)/n of the gradients' bytes: 2 a parameter here, 4 under autocast, whose gradients are fp32.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmp import models
from fastmp.amp.accumulation import Accumulator
from fastmp.bench import learners, train
from fastmp.bench.clocks import Run, step_clock
from fastmp.bench.harness import OURS, Case, Row, Timing, announce_compiled, interleave
from fastmp.distributed import data_parallel, rendezvous

ROUNDS = 15


def _ours(model: nn.Module) -> nn.Module:
    return data_parallel.parallel(model, Accumulator(model.parameters()), static=True)


def _theirs(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)


def _worker(rank: int, size: int, name: str, kind: str, rounds: int, folder: str) -> None:
    if kind == "cpu":
        torch.set_num_threads(1)
    store = f"file://{folder}/store"
    with rendezvous.group(torch.device(kind, rank), rank, size, init_method=store):
        timings = _timings(rank, size, name, kind, rounds)
    if rank == 0:
        content = {name: asdict(timing) for name, timing in timings.items()}
        (Path(folder) / "timings.json").write_text(json.dumps(content))


def _timings(rank: int, size: int, name: str, device: str, rounds: int) -> dict[str, Timing]:
    workload = train.images(name, models.MODELS[name], (1, 28, 28), 10, 256)
    torch.manual_seed(0)
    model = workload.make().to(device)
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    made = {
        OURS: learners.ours(workload, model, device, dtype, wrap=_ours),
        "DDP + AMP": learners.torch_amp(workload, model, device, dtype, wrap=_theirs),
        "DDP, fp32": learners.torch_amp(workload, model, device, torch.float32, wrap=_theirs),
    }
    inputs = workload.inputs(device, seed=rank)

    def together(learner: learners.Learner) -> float:
        loss = learner.step(*inputs)
        dist.all_reduce(loss)  # the step ends when it has ended on all
        return float(loss) / size

    runs: dict[str, Run] = {name: partial(together, learner) for name, learner in made.items()}
    first = {name: together(learner) for name, learner in made.items()}
    timings = interleave(runs, rounds, f"{name} on {size}", step_clock(device))
    last = {name: together(learner) for name, learner in made.items()}
    for losses in (first, last):
        learners.check(losses, first[OURS])
    return timings


def measured(size: int, name: str, device: str, rounds: int) -> dict[str, Timing]:
    """Milliseconds a step with that many processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, name, device, rounds, folder)
        torch.multiprocessing.spawn(_worker, arguments, nprocs=size)  # type: ignore[attr-defined,no-untyped-call]
        content = json.loads((Path(folder) / "timings.json").read_text())
    return {name: Timing(**timing) for name, timing in content.items()}


def case(name: str, sizes: list[int], device: str, rounds: int) -> list[Row]:
    """One row for each number of processes."""
    announce_compiled()  # nothing is compiled
    rows: list[Row] = []
    alone: dict[str, Timing] = {}
    for size in sizes:
        timings = measured(size, name, device, rounds)
        alone = alone or timings
        kept = ", ".join(f"{k} {alone[k].median / t.median:.0%}" for k, t in timings.items())
        label = f"{name}, {size} x 256 images, {size} process{'es' if size > 1 else ''}"
        rows.append(Row("scaling", label, timings, notes=f"of the speed of one, each: {kept}"))
    return rows


def cases(device: str, quick: bool) -> list[Case]:
    """mlp has the most to exchange for its arithmetic, convnet the least."""
    most = torch.cuda.device_count() if device == "cuda" else min(os.cpu_count() or 1, 8)
    sizes = [n for n in (1, 2, 4, 8) if n <= most]
    if quick:
        return [Case("mlp", partial(case, "mlp", sizes[:1], device, 3))]
    return [Case(n, partial(case, n, sizes, device, ROUNDS)) for n in ("mlp", "convnet")]
