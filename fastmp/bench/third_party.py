"""Kernels of other libraries, where installed: ``pip install 'fastmp[third-party]'``.

A candidate that does different work, 8-bit moments or a loss of one target, is shown, not ranked.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmp.bench.clocks import Run

SMOOTHING = 0.1


class ThirdParty(NamedTuple):
    """A candidate, and whether it does all that fastmp does."""

    call: Callable[..., Any]
    comparable: bool


def find(module: str) -> Any:
    """The module, or None; the reason goes to stderr if it is installed but broken."""
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


def losses(device: str) -> dict[str, ThirdParty]:
    """Functions of (logits, labels, the partners' labels, λ of the first)."""
    found: dict[str, ThirdParty] = {}
    timm, mixup = find("timm.loss"), find("timm.data.mixup")
    if timm is not None and mixup is not None:
        soft = timm.SoftTargetCrossEntropy()

        def with_timm(logits: Tensor, a: Tensor, b: Tensor, lam: float) -> Any:
            # timm's partners are the batch in reverse, as they are here
            return soft(logits, mixup.mixup_target(a, logits.shape[1], lam, SMOOTHING))

        found["timm"] = ThirdParty(with_timm, True)
    if device != "cuda":
        return found
    liger, quack = find("liger_kernel.transformers.functional"), find("quack.cross_entropy")
    if liger is not None:

        def with_liger(logits: Tensor, a: Tensor, b: Tensor, lam: float) -> Any:
            return liger.liger_cross_entropy(logits, a, label_smoothing=SMOOTHING)

        found["Liger, one target"] = ThirdParty(with_liger, False)
    if quack is not None:
        found["QuACK, one target, no smoothing"] = ThirdParty(
            lambda logits, a, b, lam: quack.cross_entropy(logits, a), False
        )
    return found


def optimizers(device: str, lr: float) -> dict[str, ThirdParty]:
    """Optimizers of 16-bit weights, as functions of the parameters; all need a GPU."""
    found: dict[str, ThirdParty] = {}
    if device != "cuda":
        return found
    flash, ao, bnb = map(find, ("flashoptim", "torchao.optim", "bitsandbytes.optim"))
    if flash is not None:
        found["FlashOptim, fp32 state"] = ThirdParty(
            lambda p: flash.FlashAdamW(p, lr=lr, quantize=False, master_weight_bits=32), True
        )
        found["FlashOptim, 8 bits"] = ThirdParty(lambda p: flash.FlashAdamW(p, lr=lr), False)
    if ao is not None:
        found["torchao, 8 bits"] = ThirdParty(lambda p: ao.AdamW8bit(p, lr=lr), False)
    if bnb is not None:
        found["bitsandbytes, 8 bits"] = ThirdParty(lambda p: bnb.AdamW8bit(p, lr=lr), False)
    return found


def working(runs: dict[str, Run]) -> dict[str, Run]:
    """The candidates that run; an exception of another's code goes to stderr and ends nothing."""
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
