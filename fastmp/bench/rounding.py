"""How far right candidates of an optimizer step may be apart after as many steps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastmp.bench.harness import OURS

LR = 1e-3  # of the candidates
U = 2.0**-24  # relative, of a rounding to fp32


def check(results: dict[str, list[Tensor]], steps: int, roundings: int = 3) -> None:
    """Assert that every candidate took that many steps from the same start, with AdamW's defaults.

    A weight is rounded at most three times a step: the decay's factor, the product with it, the
    difference (an average of weights twice more). The same gradient every step makes the same
    error every step where a new weight is half-way between two numbers: after 130 steps 2 of 16.7 M
    were 1.2e-5 apart, and the bound grows as ``steps``. An update, of size LR, has a relative error
    of 20 roundings from the clip's norm, the first moment, the root and the quotient, and 0.75 more
    with every step from the second moment.

    Raises:
        AssertionError: with the name of the candidate.
    """
    weight = 2 * U * roundings * steps  # of two candidates
    update = 2 * U * LR * steps * (20 + 0.75 * steps / 2)
    for name, found in results.items():
        message = partial("{}: {}".format, name)
        for ours, theirs in zip(results[OURS], found, strict=True):
            # the weight itself was up to LR larger in each of the steps
            torch.testing.assert_close(
                ours, theirs, rtol=weight, atol=update + weight * LR * steps, msg=message
            )
