"""``fastmp doctor``: what is installed, what runs where, and what mends what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import tyro

from fastmp import doctor
from fastmp.doctor import Finding


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices and what each operation runs on, and how to mend what is amiss."""


def main(arguments: Sequence[str]) -> None:
    """Show versions, devices and what each operation runs on, and how to mend what is amiss."""
    tyro.cli(Doctor, prog="fastmp doctor", args=arguments)
    print(page(doctor.examine()))


def page(findings: Sequence[Finding]) -> str:
    """The findings by topic, then what can be mended, with the command."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for topic, group in groupby(findings, key=lambda finding: finding.topic):
        lines.append(topic)
        for finding in group:
            mark = "!" if finding.problem else " "
            lines.append(f" {mark} {finding.name:<{width}}  {finding.found}")
        lines.append("")
    troubled = [finding for finding in findings if finding.problem]
    for finding in troubled:
        lines.append(f"{finding.name}: {finding.problem}")
        lines += [f"    {finding.cure}"] if finding.cure else []
    return "\n".join(lines if troubled else [*lines, "nothing to mend"])
