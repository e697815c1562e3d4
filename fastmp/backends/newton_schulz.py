"""The Newton-Schulz iteration as a backend runs it: instructions, and matrices to run them on."""

from __future__ import annotations

from typing import NamedTuple

#: Buffers. Two hold the matrices; the others, from ``GRAM`` on, square ones of their shorter side.
X, OTHER, GRAM = 0, 1, 2


class Instruction(NamedTuple):
    """One product of buffers: out = alpha a b + beta c + gamma d.

    Attributes:
        kind: "gram", a aᵀ (aᵀ a of tall matrices); "square", of symmetric matrices that commute, so
            that the result is symmetric; "apply", of a square matrix a and b (b a of tall ones).
        a, b, out: numbers of buffers; ``out`` is another one than the rest.
        c, d: None: there is no such term.
    """

    kind: str
    a: int
    b: int
    out: int
    alpha: float = 1.0
    c: int | None = None
    beta: float = 0.0
    d: int | None = None
    gamma: float = 0.0


class Batch(NamedTuple):
    """Matrices of one shape.

    Attributes:
        size: how many there are.
        rows, columns: of each.
        scale: of the result.
        eps: the least norm that a matrix is divided by, before the first instruction.
        instructions: of the iteration. They begin in ``X`` or ``OTHER`` and end in ``X``.
    """

    size: int
    rows: int
    columns: int
    scale: float
    eps: float
    instructions: tuple[Instruction, ...]
