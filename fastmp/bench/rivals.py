"""What others offer for the same work, where it is installed: ``pip install 'fastmp[rivals]'``.

"Other work" is 8-bit moments, or a loss of one target: it is timed beside, and is no baseline.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmp.bench.harness import Run

SMOOTHING = 0.1


class Rival(NamedTuple):
    """A candidate, and whether it does all that fastmp does."""

    call: Callable[..., Any]
    same_work: bool


def _found(module: str) -> Any:
    """The module, or None; one that is there but broken is said and passed over."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return None
        reason: Exception = error
    except Exception as error:
        reason = error
    print(f"{module} is installed, but cannot be imported: {reason}", file=sys.stderr)
    return None


def losses(device: str) -> dict[str, Rival]:
    """Functions of (logits, labels, the partners' labels, share of the first)."""
    found: dict[str, Rival] = {}
    timm, mixup = _found("timm.loss"), _found("timm.data.mixup")
    if timm is not None and mixup is not None:
        soft = timm.SoftTargetCrossEntropy()

        def with_timm(logits: Tensor, a: Tensor, b: Tensor, lam: float) -> Any:
            # timm's partners are the batch in reverse, as they are here
            return soft(logits, mixup.mixup_target(a, logits.shape[1], lam, SMOOTHING))

        found["timm"] = Rival(with_timm, True)
    liger = _found("liger_kernel.transformers.functional") if device == "cuda" else None
    if liger is not None:

        def with_liger(logits: Tensor, a: Tensor, b: Tensor, lam: float) -> Any:
            return liger.liger_cross_entropy(logits, a, label_smoothing=SMOOTHING)

        found["Liger, one target"] = Rival(with_liger, False)
    quack = _found("quack.cross_entropy") if device == "cuda" else None
    if quack is not None:
        found["QuACK, one target, no smoothing"] = Rival(
            lambda logits, a, b, lam: quack.cross_entropy(logits, a), False
        )
    return found


def optimizers(device: str, lr: float) -> dict[str, Rival]:
    """Optimizers of 16-bit weights, as functions of the parameters: all of them for GPUs."""
    found: dict[str, Rival] = {}
    if device != "cuda":
        return found
    flash, ao, bnb = map(_found, ("flashoptim", "torchao.optim", "bitsandbytes.optim"))
    if flash is not None:
        found["FlashOptim, fp32 state"] = Rival(
            lambda p: flash.FlashAdamW(p, lr=lr, quantize=False, master_weight_bits=32), True
        )
        found["FlashOptim, 8 bits"] = Rival(lambda p: flash.FlashAdamW(p, lr=lr), False)
    if ao is not None:
        found["torchao, 8 bits"] = Rival(lambda p: ao.AdamW8bit(p, lr=lr), False)
    if bnb is not None:
        found["bitsandbytes, 8 bits"] = Rival(lambda p: bnb.AdamW8bit(p, lr=lr), False)
    return found


def working(runs: dict[str, Run]) -> dict[str, Run]:
    """Those that run; what another's code raises is said, and costs only its own line."""
    kept = {}
    for name, run in runs.items():
        try:
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:
            print(f"{name} does not run: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            kept[name] = run
    return kept
