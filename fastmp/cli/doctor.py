"""``fastmp doctor``: the installation, the backend of each operation, and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import tyro

from fastmp import doctor
from fastmp.doctor import Finding


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices, the backend of each operation, and how to fix what is wrong."""


def main(arguments: Sequence[str]) -> None:
    """Show versions, devices, the backend of each operation, and how to fix what is wrong."""
    tyro.cli(Doctor, prog="fastmp doctor", args=arguments)
    print(page(doctor.examine()))


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
