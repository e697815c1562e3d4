"""``fastmp doctor``: the installation, the backend of each operation, and how to fix it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn

from fastmp import doctor, models
from fastmp.bench import memory
from fastmp.doctor import Finding
from fastmp.models import ModelError
from fastmp.optim import AdamW


def parser() -> argparse.ArgumentParser:
    """The flags; argparse, since the installation can be looked at without the extra [train]."""
    found = argparse.ArgumentParser(prog="fastmp doctor", description=main.__doc__)
    found.add_argument(
        "--model", metavar="NAME",
        help="package.module:factory, a function of nothing: show the bytes its model trains in",
    )  # fmt: skip
    return found


def main(arguments: Sequence[str]) -> None:
    """Show versions, devices, the backend of each operation, and how to fix what is wrong."""
    options = parser().parse_args(arguments)
    if options.model is not None:
        with torch.device("meta"):
            model = models.made_by(options.model)
        if not any(p.requires_grad for p in model.parameters()):
            raise ModelError(f"--model {options.model}: expected parameters to train, found none")
        print(memory_page(model))
        return
    print(page(doctor.examine()))


def memory_page(model: nn.Module) -> str:
    """MiB of weights, gradients and state for every choice of dtypes, with AdamW."""
    count = sum(p.numel() for p in model.parameters())
    lines = [
        f"{count:,} parameters, AdamW; MiB without activations",
        "",
        f"{'weights':>10} {'moments':>8} | {'weights':>9} {'gradients':>9} {'masters':>9} "
        f"{'moments':>9} {'total':>9} | {'ema adds':>9}",
    ]
    for row in memory.table(model, AdamW):
        mib = (row.weights, row.gradients, row.masters, row.moments, row.total)
        shown = " ".join(f"{size / 2**20:9,.1f}" for size in mib)
        added = f"{row.average / 2**20:9,.1f}"
        lines.append(f"{row.name:>10} {row.state_dtype:>8} | {shown} | {added}")
    return "\n".join(lines)


def page(findings: Sequence[Finding]) -> str:
    """The findings by topic, then the problems, each with the command that fixes it."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for topic, group in groupby(findings, key=lambda finding: finding.topic):
        lines.append(topic)
        for finding in group:
            mark = "!" if finding.problem else " "
            lines.append(f" {mark} {finding.name:<{width}}  {finding.found}")
        lines.append("")
    problems = [finding for finding in findings if finding.problem]
    for finding in problems:
        lines.append(f"{finding.name}: {finding.problem}")
        lines += [f"    {finding.fix}"] if finding.fix else []
    return "\n".join(lines if problems else [*lines, "nothing to fix"])
