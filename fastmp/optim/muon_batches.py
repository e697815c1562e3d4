"""The directions of Muon's matrices: memory of both passes, in batches of one shape."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmp.backends.newton_schulz import Batch
from fastmp.ops.orthogonalize import Iteration, instructions, iteration
from fastmp.ops.update import TensorRow


class _Kind(NamedTuple):
    """What the matrices of a batch have in common."""

    options: tuple[Any, ...]  # coefficients, steps, eps, adjust_lr_fn of their groups
    scale: float
    shape: tuple[int, int]  # as they lie in memory
    dtype: torch.dtype


class Directions:
    """One direction for each row of a Muon group, in the parameter's order of elements.

    Attributes:
        options: of the groups, None for others; rows of groups with equal ones share batches.
        sources: of the rows of these groups, in their order, each of its parameter's shape:
            written before ``orthogonalize``.
        results: the same, after it.
    """

    def __init__(self, rows: Sequence[TensorRow], options: list[tuple[Any, ...] | None]) -> None:
        """Allocate them.

        Raises:
            ValueError: a weight that is no matrix in memory.
        """
        self.options = options
        members: dict[torch.dtype, dict[_Kind, list[int]]] = defaultdict(lambda: defaultdict(list))
        own = [(row.param, options[row.group]) for row in rows]
        chosen = [(param, option) for param, option in own if option is not None]
        for i, (param, option) in enumerate(chosen):
            fp64 = param.dtype == torch.float64
            dtype = torch.float64 if fp64 else torch.bfloat16
            scale = adjustment(option[-1], param.shape)
            kind = _Kind(option, scale, matrix_shape(param), dtype)
            members[dtype][kind].append(i)
        self._iterations: list[Iteration] = []
        sources: dict[int, Tensor] = {}
        results: dict[int, Tensor] = {}
        for dtype, kinds in members.items():
            batches = [_batch(kind, len(indices)) for kind, indices in kinds.items()]
            made = iteration(batches, dtype, chosen[0][0].device)
            self._iterations.append(made)
            for indices, source, result in zip(
                kinds.values(), made.sources, made.results, strict=True
            ):
                for i, before, after in zip(indices, source, result, strict=True):
                    sources[i] = _like(chosen[i][0], before)
                    results[i] = _like(chosen[i][0], after)
        self.sources = [sources[i] for i in range(len(chosen))]
        self.results = [results[i] for i in range(len(chosen))]

    def orthogonalize(self) -> None:
        """Make the polar factors of the sources, times what the lr is adjusted by."""
        for made in self._iterations:
            made.run()


def _batch(kind: _Kind, count: int) -> Batch:
    coefficients, steps, eps, _ = kind.options
    code = instructions(*kind.shape, coefficients, steps)
    return Batch(count, *kind.shape, kind.scale, eps, code)


def adjustment(adjust_lr_fn: str | None, shape: Sequence[int]) -> float:
    """What the lr of a weight is multiplied by, as ``adjust_lr_fn`` of ``torch.optim.Muon``.

    Args:
        adjust_lr_fn: None or "original": sqrt(max(1, rows / columns)) (Jordan et al. 2024);
            "match_rms_adamw": 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, arXiv:2502.16982).
        shape: of the weight; rows are its first dimension.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    if rows * columns == 0:
        return 1.0
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _order(param: Tensor) -> list[int]:
    """The dimensions of more than one element, from the outermost in memory to the innermost."""
    dims = [d for d in range(param.ndim) if param.shape[d] != 1]
    strides = param.stride()
    return sorted(dims, key=lambda d: -strides[d])


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """Rows and columns of the memory of a weight: (out, rest), or (rest, out) of a transposed one.

    The polar factor of a transposed matrix is transposed, that of permuted columns is permuted: no
    element has to move.

    Raises:
        ValueError: the first dimension lies between others.
    """
    out, order = param.shape[0], _order(param)
    rest = math.prod(param.shape[1:])
    if 0 not in order or order[0] == 0:
        return out, rest
    if order[-1] == 0:
        return rest, out
    raise ValueError(
        f"expected a weight whose first dimension is the outermost or the innermost in memory, got "
        f"shape {tuple(param.shape)} with strides {param.stride()}; call .contiguous() on it"
    )


def _like(param: Tensor, memory: Tensor) -> Tensor:
    """``memory`` in the shape of ``param``, its elements in the same order."""
    strides, stride = [1] * param.ndim, 1
    for d in reversed(_order(param)):
        strides[d] = stride
        stride *= param.shape[d]
    return memory.as_strided(param.shape, strides)
