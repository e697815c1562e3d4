"""Launches that may begin before the one ahead of them in the stream has ended.

Programmatic dependent launch, compute capability 9.0 and newer: the programs of an early launch are
on their multiprocessors when the launch ahead ends, and wait there. An ordinary one is started only
then, once its memory is written back.

Every program of an early launch waits before it touches memory, but for tables that the host wrote
before the first one. So all that ran before has ended, launches before the one ahead included.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from fastmp.backends.triton import architecture

_MINIMUM_ARCHITECTURE = 90


@triton.jit
def allow_next_launch(EARLY: tl.constexpr):
    """Programs of the next launch may begin, if it is early, once all of this one are here."""
    if EARLY:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous_launch(EARLY: tl.constexpr):
    """Until the launch ahead has ended and its stores are visible."""
    if EARLY:
        cuda.gdc_wait()


def early_launch(device: torch.device) -> dict[str, Any]:
    """Options of a launch: EARLY of the kernel, and that it may begin early, where devices can."""
    if triton.knobs.runtime.interpret or architecture(device) < _MINIMUM_ARCHITECTURE:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}
