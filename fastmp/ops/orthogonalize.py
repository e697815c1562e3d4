"""orthogonalize: Newton-Schulz iteration on batches of matrices, for Muon.

    X <- X / max(||X||_F, eps)
    steps times, with G = X Xᵀ (Xᵀ X for tall matrices, and products from the other side):
        X <- (a I + b G + c G²) X

Every singular value s goes through a s + b s³ + c s⁵ (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). Matrices of one shape are one batch: a call of the
vendor's library for all of them, and of a tall matrix no transposed copy.

Operations, in units of 2 n³ for an n x r n matrix and k steps: k (2 r + 1), for r = 4 and k = 5 45.
From r = ``GRAM_RATIO`` on the iteration runs on G alone, which follows from itself, and X is
multiplied once a segment by the product of its polynomials (as in "Gram Newton-Schulz", Dao-AILab
2026):

    Q <- p(G) Q,   G <- p(G)² G,   at the end of the segment X <- Q X

with two segments of three and two steps 4 r + 14, for r = 4 30. In one segment the rounding of G,
which grows by a² a step, would exceed its small eigenvalues: G is computed again from X (the
restart), after three steps at first and two later. Error against fp64 of five steps in bf16, normal
192 x 768 matrices: 1.3% as torch has it, 4.0% here; singular values falling to 1e-3 of the first:
6.0% and 4.7%. Two steps, then three: 8.5% and 15%. Q and p(G) are kept without their multiple of I,
whose rounding would be that of 12 beside entries of 0.01.

Products round to the dtype of X, once each, and are summed in fp32; the norm is fp32, and a matrix
whose norm squared exceeds fp32 becomes 0. All but those with X are symmetric, and so is G; a
backend may compute half of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmp.backends import registry
from fastmp.backends.newton_schulz import GRAM, OTHER, Batch, Instruction, X

#: How many times as long as wide a matrix is from which on the iteration on G is faster: 22 units
#: against 25 by the counts above.
GRAM_RATIO = 2.0
#: The least size of G for that: the rounding of few elements does not average out. The step of a
#: 1 x 5 matrix was wrong by 19%, that of 24 x 120 by 1.1%.
GRAM_SIZE = 16
_FIRST, _LATER = 3, 2  # steps of a segment
#: The matrix products of the iteration on a device, with the arguments of ``_torch_product``.
Product = Callable[..., Tensor]
_SQUARES = 4  # buffers of the size of G: G, Q, p(G), and one for what follows from them


def orthogonalize_(
    x: Tensor,
    coefficients: Sequence[float],
    steps: int,
    eps: float,
    scale: float = 1.0,
) -> Tensor:
    """Replace matrices by their approximate polar factors (U Vᵀ of U S Vᵀ), times ``scale``.

    Args:
        x: (batch, rows, columns), contiguous, bf16, fp32 or fp64; changed in place.
        coefficients: a, b, c of the polynomial.
        steps: of the iteration, at least 1.
        eps: the least norm that a matrix is divided by.
        scale: of the result; it goes into the last product.

    Returns:
        ``x``.
    """
    size, rows, columns = x.shape
    code = instructions(rows, columns, tuple(coefficients), steps)
    _run(x, Batch(size, rows, columns, scale, eps, code), x.new_empty(workspace_size(x.shape)))
    return x


def _run(x: Tensor, of: Batch, workspace: Tensor) -> None:
    """Replace the matrices of a batch by the results."""
    if x.numel() == 0:
        return
    batch, rows, columns = x.shape
    wide, short = rows <= columns, min(rows, columns)
    other, *squares = workspace[: workspace_size(x.shape)].split(
        [x.numel(), *[batch * short * short] * _SQUARES]
    )
    buffers = [x, other.view_as(x), *(square.view(batch, short, short) for square in squares)]
    torch.div(x, _norms(x).clamp_(min=of.eps), out=buffers[of.instructions[0].a])
    kernel, _ = registry.select("orthogonalize", x.device, x.dtype)
    product: Product = _torch_product if kernel is None else kernel
    for i, (kind, a, b, out, alpha, c, beta, d, gamma) in enumerate(of.instructions):
        left, right = buffers[a], buffers[b]
        if kind == "gram":
            left, right = (left, left.mT) if wide else (left.mT, left)
        elif kind == "apply" and not wide:
            left, right = right, left
        factor = of.scale if i == len(of.instructions) - 1 else 1.0
        term = None if c is None else buffers[c]
        symmetric = kind != "apply"
        result = product(
            left, right, term, factor * beta, factor * alpha, symmetric=symmetric, out=buffers[out]
        )
        if d is not None:
            result.add_(buffers[d], alpha=gamma)


def workspace_size(shape: Sequence[int]) -> int:
    """Elements that ``orthogonalize_`` needs beside matrices of this shape."""
    batch, rows, columns = shape
    return batch * (rows * columns + _SQUARES * min(rows, columns) ** 2)


def _norms(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=dtype)
    return norms


# ---- many matrices ----


class Iteration(Protocol):
    """The iteration of all batches, with its memory.

    Attributes:
        sources: of each batch, (size, rows, columns): the matrices, finite, written before ``run``.
        results: of each batch, after it; perhaps the same memory.
    """

    sources: list[Tensor]
    results: list[Tensor]

    def run(self) -> None:
        """Make the results."""


def iteration(batches: Sequence[Batch], dtype: torch.dtype, device: torch.device) -> Iteration:
    """The iteration of these batches on a device, all of a dtype."""
    kernel, _ = registry.select("orthogonalize_batches", device, dtype, device)
    if kernel is None:
        return _BatchByBatch(batches, dtype, device)
    made: Iteration = kernel(batches, device)
    return made


class _BatchByBatch:
    """One batch after the other, in place."""

    def __init__(self, batches: Sequence[Batch], dtype: torch.dtype, device: torch.device) -> None:
        shapes = [(batch.size, batch.rows, batch.columns) for batch in batches]
        self.sources = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.results = self.sources
        self._batches = list(batches)
        size = max(map(workspace_size, shapes), default=0)
        self._workspace = torch.empty(size, dtype=dtype, device=device)

    def run(self) -> None:
        for batch, matrices in zip(self._batches, self.sources, strict=True):
            _run(matrices, batch, self._workspace)


# ---- the instructions ----


@cache
def instructions(
    rows: int, columns: int, coefficients: tuple[float, ...], steps: int
) -> tuple[Instruction, ...]:
    """The products of the iteration; the division by the norm comes before, the scale at the end.

    Args:
        rows, columns: of the matrices.
        coefficients, steps: as in ``orthogonalize_``.

    Returns:
        They begin in buffer ``X`` or ``OTHER``, so as to end in ``X``.
    """
    long, short = max(rows, columns), min(rows, columns)
    on_gram = long >= GRAM_RATIO * short and short >= GRAM_SIZE
    segments = _segments(steps) if on_gram else [1] * steps
    source, target = (OTHER, X) if len(segments) % 2 else (X, OTHER)
    pool = list(range(GRAM, GRAM + _SQUARES))
    code: list[Instruction] = []
    for count in segments:
        gram = pool.pop()
        code.append(Instruction("gram", source, source, gram))
        q, diagonal = _polynomials(code, gram, coefficients, count, pool)
        code.append(Instruction("apply", q, source, target, 1.0, source, diagonal))
        pool.append(q)
        source, target = target, source
    return tuple(code)


def _segments(steps: int) -> list[int]:
    """How many steps each value of G that is computed from X serves."""
    counts = [min(_FIRST, steps)]
    while sum(counts) < steps:
        counts.append(min(_LATER, steps - sum(counts)))
    return counts


def _polynomials(
    code: list[Instruction], g: int, coefficients: Sequence[float], count: int, pool: list[int]
) -> tuple[int, float]:
    """The product of the polynomials of ``count`` steps that start at G, as Q + diagonal I.

    All are polynomials in G: symmetric, and their products commute. Buffers come from ``pool`` and
    go back to it, G's too.
    """
    a, b, c = coefficients

    def square(
        left: int, right: int, out: int, alpha: float, c: int, beta: float, *more: Any
    ) -> int:
        code.append(Instruction("square", left, right, out, alpha, c, beta, *more))
        return out

    q = square(g, g, pool.pop(), c, g, b)
    diagonal = a
    p = q
    for _ in range(count - 1):
        half = square(p, g, pool.pop(), 1.0, g, a)
        square(p, half, g, 1.0, half, a)
        p = square(g, g, half if p == q else p, c, g, b)
        # (P + a I)(Q + d I) = P Q + a Q + d P + a d I
        free = pool.pop() if p == half else half
        square(p, q, free, 1.0, p, diagonal, q, a)
        pool.append(q)
        q = free
        diagonal *= a
    pool.extend([g] if p == q else [g, p])
    return q, diagonal


def _torch_product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
    *,
    symmetric: bool = False,
    out: Tensor,
) -> Tensor:
    """alpha a b + beta c of batches; ``symmetric``: the result is, up to rounding."""
    if c is None:
        torch.bmm(a, b, out=out)
    else:
        torch.baddbmm(c, a, b, beta=beta, alpha=alpha, out=out)
    return out


registry.define("orthogonalize", kernels=("orthogonalize", "orthogonalize_batches"))
