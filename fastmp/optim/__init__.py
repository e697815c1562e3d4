"""Drop-in optimizers: torch's arguments and state, one fused call for the whole step.

    optimizer = fastmp.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)

Parameters may be fp16 or bf16: each then has an fp32 master, kept in the optimizer's state beside
the moments, which are fp32 whatever the parameter is. Every step unscales, looks for non-finite
gradients, takes the global norm, clips, updates and rounds back in one call; if any gradient is not
finite, nothing changes but the count of skipped steps.

Differences from torch, each on purpose:

- a non-finite gradient skips the step, with or without a GradScaler (``skip_nonfinite``);
- gradients are left as they came: torch's fused step leaves them unscaled, one more write;
- ``differentiable=True`` is refused; ``foreach``, ``fused`` and ``capturable`` are accepted and
  have no effect: there is one implementation;
- fp16 weights changed through ``.data`` behind autograd's back are not noticed (any other in-place
  change is, and reaches the master): use ``with torch.no_grad()``.
"""

from __future__ import annotations

from fastmp.optim import lr_scheduler
from fastmp.optim.adam import Adam, AdamW
from fastmp.optim.lion import Lion
from fastmp.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion", "lr_scheduler"]
