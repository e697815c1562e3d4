"""Options of parameter groups as plain Python numbers."""

from __future__ import annotations

from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """NumPy's numbers and arrays of one element as Python's, in tuples and dicts too.

    ``json``, ``torch.load(weights_only=True)`` and checkpoints take those only.
    """
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1):
        return float(value) if isinstance(value, np.longdouble) else value.item()
    if type(value) is tuple:
        return tuple(map(plain, value))
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return value


def drop_repeats(group: dict[str, Any]) -> None:
    """Leave each parameter of a group in it once, with its name.

    torch warns of one that is there twice, and steps it twice; a fused step would do so at once.
    """
    first: dict[Any, int] = {}
    for i, param in enumerate(group["params"]):
        first.setdefault(param, i)
    if len(first) < len(group["params"]):
        group["params"] = list(first)
        if "param_names" in group:
            group["param_names"] = [group["param_names"][i] for i in first.values()]


def norm_limit(value: Any) -> float | None:
    """``max_grad_norm`` as a number above 0, or None.

    Raises:
        ValueError: 0, a negative number or NaN.
    """
    if value is None:
        return None
    if not float(value) > 0:
        raise ValueError(
            f"Invalid max_grad_norm: expected a number above 0, got {value}; "
            "None means that gradients are not clipped"
        )
    return float(value)
