"""Drop-in optimizers: torch's arguments and state, one fused call for the whole step.

    optimizer = fastmp.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)

Parameters may be fp16 or bf16: each then has an fp32 master in the optimizer's state, beside the
moments, which are fp32 unless ``state_dtype`` says bf16 or 8 bits; ``ema`` adds an average of the
weights. One call unscales, checks for non-finite gradients, takes
the global norm, clips, updates and rounds the weights; if any gradient is not finite, only the
count of skipped steps changes.

Differences from torch, each on purpose:

- a non-finite gradient skips the step, with or without a GradScaler (``skip_nonfinite``);
- gradients stay as they are: torch's fused step unscales them in place, one more write;
- ``differentiable=True`` is refused; ``foreach``, ``fused`` and ``capturable`` are accepted and
  have no effect: there is one implementation.

A 16-bit weight that was changed from outside (in place, through ``.data``, by ``load_state_dict``)
replaces its master: a master is finer than the weight only while it rounds to it. One limit: a bf16
weight changed through ``.data``, past autograd, to another value than 0 keeps its old remainder, at
most half a unit in its last place. Use ``with torch.no_grad()`` there.
"""

from __future__ import annotations

from fastmp.optim import lr_scheduler
from fastmp.optim.adam import Adam, AdamW
from fastmp.optim.lion import Lion
from fastmp.optim.muon import Muon
from fastmp.optim.muon_groups import muon_groups
from fastmp.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion", "Muon", "lr_scheduler", "muon_groups"]
