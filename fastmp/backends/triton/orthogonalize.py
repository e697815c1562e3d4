"""orthogonalize on the Triton kernels: one launch for each instruction, whatever the shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import registry, triton
from fastmp.backends.newton_schulz import GRAM, OTHER, Batch, Instruction, X
from fastmp.backends.triton.tiles import ProductTile, product_tile

UNIT = 8  # elements: 16 bytes, of which offsets, sizes and strides are multiples
FIELDS = 12  # of a tile; the head of the kernel has their order
# Of all square buffers together, 256 MB: matrices beyond it iterate after the others, in the same
# memory. The 36 long matrices of a ViT-B need 170 MB.
_MAX_SQUARES = 1 << 27
_NORMALIZE_BLOCK = 4096
_SLOTS = 16  # parts of a norm: matrices to 1,024 x 1,024 share one compiled kernel

#: What captured graphs use when they are replayed, kept as long as the process lives.
_captured: list[Any] = []


class _Matrix(NamedTuple):
    """One matrix, padded with zeros to whole units; offsets are elements of the buffers."""

    offset: int
    rows: int
    columns: int
    scale: float

    @property
    def short(self) -> int:
        """The size of its square matrices."""
        return min(self.rows, self.columns)


class GroupedIteration:
    """Buffers and launches of all matrices.

    Attributes:
        sources: of each batch, (size, rows, columns): the matrices, which the caller writes.
        results: of each batch, after ``run``, until the sources are written again.
    """

    def __init__(self, batches: Sequence[Batch], device: torch.device) -> None:
        padded = [(_whole(batch.rows), _whole(batch.columns)) for batch in batches]
        sizes = [batch.size * m * n for batch, (m, n) in zip(batches, padded, strict=True)]
        ends = np.cumsum(sizes).tolist()
        # zeros: a first step that is skipped is still orthogonalised, and so are the pads
        pair = [torch.zeros(ends[-1], dtype=torch.bfloat16, device=device) for _ in (X, OTHER)]
        self.sources: list[Tensor] = []
        self.results: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor, Tensor]] = []
        groups: dict[Any, list[_Matrix]] = defaultdict(list)
        for batch, (rows, columns), size, end in zip(batches, padded, sizes, ends, strict=True):
            at = slice(end - size, end)
            views = [buffer[at].view(batch.size, rows, columns) for buffer in pair]
            source, result = views[batch.instructions[0].a], views[X]
            if (rows, columns) != (batch.rows, batch.columns):
                inside = (slice(None), slice(batch.rows), slice(batch.columns))
                flat = torch.zeros(
                    batch.size, batch.rows, batch.columns, dtype=torch.bfloat16, device=device
                )
                self._copies.append((flat, source[inside], result[inside]))
                source = result = flat
            self.sources.append(source)
            self.results.append(result)
            if size:
                groups[batch.instructions, batch.eps] += [
                    _Matrix(offset, rows, columns, batch.scale)
                    for offset in range(end - size, end, rows * columns)
                ]
        squares = torch.empty(_square_memory(groups), dtype=torch.bfloat16, device=device)
        self.launches: list[_Launch] = []
        for (instructions, eps), matrices in groups.items():
            for part in _parts(matrices, instructions):
                self.launches += _Group(part, instructions, eps, pair, squares).launches()
        self._memory = pair[X]
        self._is_kept = False

    def run(self) -> None:
        """Make the results from the sources, on the current stream."""
        if self._memory.is_cuda and not self._is_kept and torch.cuda.is_current_stream_capturing():
            _captured.append(self)
            self._is_kept = True
        with torch.cuda.device_of(self._memory):
            for flat, source, _ in self._copies:
                source.copy_(flat)
            stream = torch.cuda.current_stream().cuda_stream if self._memory.is_cuda else 0
            for launch in self.launches:
                launch(stream)
            for flat, _, result in self._copies:
                flat.copy_(result)


def _whole(size: int) -> int:
    return -(-size // UNIT) * UNIT


def _buffers(instructions: Sequence[Instruction]) -> list[int]:
    """The square buffers that they use."""
    return sorted({i.out for i in instructions if i.out >= GRAM})


def _parts(
    matrices: Sequence[_Matrix], instructions: Sequence[Instruction]
) -> Iterator[list[_Matrix]]:
    """The matrices in parts whose square buffers have at most ``_MAX_SQUARES`` elements."""
    part: list[_Matrix] = []
    size, count = 0, len(_buffers(instructions))
    for matrix in matrices:
        own = count * matrix.short**2
        if part and size + own > _MAX_SQUARES:
            yield part
            part, size = [], 0
        part.append(matrix)
        size += own
    yield part


def _square_memory(groups: dict[Any, list[_Matrix]]) -> int:
    sizes = [
        len(_buffers(instructions)) * sum(matrix.short**2 for matrix in part)
        for (instructions, _), matrices in groups.items()
        for part in _parts(matrices, instructions)
    ]
    return max(sizes, default=0)


class _Launch:
    """A launch with its arguments.

    The first one compiles; the others go past Triton's look at the arguments, with addresses for
    tensors, of which Triton would ask the driver where they are.
    """

    def __init__(self, kernel: Any, programs: int, args: tuple[Any, ...], **options: Any) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.args = args
        self.options = options
        constants = [value for name, value in options.items() if name.isupper()]
        addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
        self._values = (*addresses, *constants)
        self._compiled: Any = None
        self._again: Any = None

    def __call__(self, stream: int) -> None:
        """Launch on the current stream, which ``stream`` is the handle of."""
        if self._again is not None:
            self._again(*self._values, stream=stream)
        elif self._compiled is None:  # always in the interpreter
            self._compiled = self.kernel[self.grid](*self.args, **self.options)
        else:
            self._again = self._compiled[self.grid]
            self._again(*self._values, stream=stream)


class _Group:
    """Matrices that have their instructions in common."""

    def __init__(
        self,
        matrices: list[_Matrix],
        instructions: Sequence[Instruction],
        eps: float,
        pair: list[Tensor],
        squares: Tensor,
    ) -> None:
        from fastmp.backends.triton.kernels.early import early_launch

        self._early = early_launch(squares.device)  # 0.02 to 0.05 ms a step (H200)
        self._instructions = instructions
        self._eps = eps
        self._matrices = np.array([matrix[:3] for matrix in matrices], np.int64)
        self.device = squares.device
        short = self._matrices[:, 1:].min(axis=1)
        self._short = short
        ends = np.cumsum(short**2)
        self._square_offsets = ends - short**2
        size = int(ends[-1])
        self._buffers = {X: pair[X], OTHER: pair[OTHER]}
        for i, number in enumerate(_buffers(instructions)):
            self._buffers[number] = squares[i * size : (i + 1) * size]
        count = len(matrices)
        self._ones = torch.ones(count, dtype=torch.float32, device=self.device)
        scales = [matrix.scale for matrix in matrices]
        self._scales = torch.tensor(scales, dtype=torch.float32, device=self.device)
        self._inverse_norms = torch.ones_like(self._ones)
        kinds = [("gram", True), ("gram", False), ("square", None), ("apply", True)]
        self._tables = {key: self._table(*key) for key in [*kinds, ("apply", False)]}
        parts = max(-(-int(short.max()) // self._tables[key][1].block_m) for key in kinds[:2])
        self._slots = max(_SLOTS, 1 << (parts - 1).bit_length())
        self._partials = torch.zeros(count, self._slots, dtype=torch.float32, device=self.device)

    def launches(self) -> Iterator[_Launch]:
        """One for each instruction and way round, one more to normalise the first G."""
        applications = [i for i, code in enumerate(self._instructions) if code.kind == "apply"]
        for i, code in enumerate(self._instructions):
            inverse_norms = self._inverse_norms if i == applications[0] else self._ones
            scales = self._scales if i == applications[-1] else self._ones
            for wide in (None,) if code.kind == "square" else (True, False):
                yield from self._product(code, wide, inverse_norms, scales)
            if i == 0:
                yield self._normalize(code.out)

    def _product(
        self, code: Instruction, wide: bool | None, inverse_norms: Tensor, scales: Tensor
    ) -> Iterator[_Launch]:
        """The launch for wide or tall matrices, or both (None), if there are any."""
        from fastmp.backends.triton.kernels import orthogonalize as kernels

        table, tile = self._tables[code.kind, wide]
        if not len(table):
            return
        a, b, out = (self._buffers[i] for i in (code.a, code.b, code.out))
        if code.kind == "apply" and not wide:
            a, b = b, a
        c = None if code.c is None else self._buffers[code.c]
        d = c if code.d is None else self._buffers[code.d]
        of_rows, of_columns = (code.kind == "gram" and wide is way for way in (True, False))
        yield _Launch(
            kernels._product_kernel, len(table),
            (
                a, b, out, c, d, self._partials, inverse_norms, scales, table,
                code.alpha, code.beta, code.gamma,
            ),
            A_COLUMNS=of_columns, B_ROWS=of_rows, SYMMETRIC=code.kind != "apply",
            SLOTS=self._slots, FIELDS=FIELDS, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, num_warps=tile.warps, num_stages=tile.stages, **self._early,
            **({} if tile.max_registers is None else {"maxnreg": tile.max_registers}),
        )  # fmt: skip

    def _normalize(self, gram: int) -> _Launch:
        from fastmp.backends.triton.kernels import orthogonalize as kernels

        rows = [
            ((offset + begin) // UNIT, min(_NORMALIZE_BLOCK, size - begin) // UNIT, matrix)
            for matrix, (offset, size) in enumerate(
                zip(self._square_offsets.tolist(), (self._short**2).tolist(), strict=True)
            )
            for begin in range(0, size, _NORMALIZE_BLOCK)
        ]
        blocks = self._upload(np.array(rows))
        args = (self._buffers[gram], self._partials, self._inverse_norms, blocks, self._eps)
        return _Launch(
            kernels._normalize_kernel, len(rows), args, SLOTS=self._slots, BLOCK=_NORMALIZE_BLOCK,
            **self._early,
        )  # fmt: skip

    def _table(self, kind: str, wide: bool | None) -> tuple[Tensor, ProductTile]:
        """The tiles of all products of a kind, those with the most operations first."""
        offset, rows, columns = self._matrices.T
        is_wide = rows <= columns
        chosen = np.flatnonzero(np.ones_like(is_wide) if wide is None else is_wide == wide)
        short, square = self._short, self._square_offsets
        if kind == "gram":
            places, sizes = (offset, offset, square, columns, columns, short), (short, short)
            inner = np.maximum(rows, columns)
        elif kind == "square":
            places, sizes = (square, square, square, short, short, short), (short, short)
            inner = short
        elif wide:
            places, sizes = (square, offset, offset, short, columns, columns), (rows, columns)
            inner = short
        else:
            places, sizes = (offset, square, offset, columns, short, columns), (rows, columns)
            inner = short
        fields = np.stack([*places, *sizes, inner], 1)[chosen]
        symmetric = kind != "apply"
        tile = product_tile(
            fields[:, 6:8].tolist(), symmetric, triton.num_sms(self.device),
            triton.architecture(self.device),
        )  # fmt: skip
        found = [np.empty((0, FIELDS), np.int64)]
        for matrix, row in zip(chosen.tolist(), fields, strict=True):
            starts = _starts(int(row[6]), int(row[7]), tile, symmetric)
            made = np.empty((len(starts), FIELDS), np.int64)
            made[:, :9] = row
            made[:, 9:11] = starts
            made[:, 11] = matrix
            found.append(made)
        tiles = np.concatenate(found)
        tiles = tiles[np.argsort(-tiles[:, 8], kind="stable")]
        tiles[:, :11] //= UNIT
        return self._upload(tiles), tile

    def _upload(self, table: np.ndarray) -> Tensor:
        return torch.from_numpy(table.astype(np.int32)).to(self.device)


def _starts(m: int, n: int, tile: ProductTile, symmetric: bool) -> np.ndarray:
    """First rows and columns of the tiles; neighbours share what the long side takes."""
    down, across = np.arange(0, m, tile.block_m), np.arange(0, n, tile.block_n)
    if m <= n:
        columns, rows = (grid.ravel() for grid in np.meshgrid(across, down, indexing="ij"))
    else:
        rows, columns = (grid.ravel() for grid in np.meshgrid(down, across, indexing="ij"))
    starts = np.stack([rows, columns], 1)
    return starts[rows >= columns] if symmetric else starts


def _supports(dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype != torch.bfloat16:
        return f"no kernel for {dtype}"
    return triton.supports_device(device)


registry.register(
    "orthogonalize_batches", "cuda", GroupedIteration, backend="triton", supports=_supports
)
