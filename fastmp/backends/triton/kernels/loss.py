"""Cross-entropy of a mixed pair of targets with label smoothing, forward and backward.

For a row of logits z with targets a and b, mixing weight λ, smoothing ε, class weights w, and
row_max = max z, e = exp(z - row_max), sum_exp = Σ e, smooth_sum = Σ_c w_c (row_max - z_c)::

    loss   = Σ_{y in a, b}  mix_weight_y · ( (1-ε) w_y (log sum_exp - (z_y - row_max))
                                             + ε/C (Σw log sum_exp + smooth_sum) )
    grad_c = softmax_coef e_c / sum_exp - smooth_coef w_c
             - target_coef_a [c = a] - target_coef_b [c = b]

    mix_weight_a  = λ / divisor_a,   mix_weight_b = (1-λ) / divisor_b
    target_coef_y = grad_output · mix_weight_y (1-ε) w_y
    smooth_coef   = grad_output (mix_weight_a + mix_weight_b) ε/C
    softmax_coef  = target_coef_a + target_coef_b + smooth_coef Σw

divisor_y is the sum of w_y over the rows that are not ignored, for the mean; 1 otherwise.

The larger t of the two targets is left out of the sum: others = Σ_{c != t} e_c. Near softmax 1
nothing then cancels (docs/numerics.md)::

    sum_exp = others + e_t,   log sum_exp = log(1 + others) where e_t = 1
    grad_t  = ((target_coef_other + smooth_coef (Σw - w_t)) e_t
               - (target_coef_t + smooth_coef w_t) others) / sum_exp

Bytes, 16-bit logits: 2 read and 2 written for each logit, and about 40 for each row. A row of up to
16,384 classes stays in registers between its two uses. A longer one comes in blocks of 2,048, three
in flight, and comes again, backwards: the blocks read last are still in the caches. A thread keeps
a maximum and a sum for each 16-byte vector of its own, and threads meet once a row. The last rows
are taken first: the matrix product before has just written them.

Tiles (tiles.py): a program takes one row after another, 32 logits a thread; a warp alone holds
1,024. The four 16-byte loads of the next row, and its targets, are in flight while a row is
computed: with 24 warps on a multiprocessor 48 KB, more than its share of the bandwidth needs
(4.8 TB/s · 0.8 us / 132 = 29 KB). A row of 1,000 classes takes about 600 instructions of a warp, 85
us for 131,072 rows where all four schedulers issue one each cycle (1.75 GHz); the bytes take 122.
Rows of up to 32 classes: ``loss_short.py``.

NVIDIA H200, 2026-11-27, device time of forward and check, without autograd, bf16, with a pair and
smoothing, and % of a copy: 131,072 x 1,000 154 us, 79%; 65,536 x 4,096 288 us, 88%; 16,384 x 1,000
28 us; 1,024 x 1,000 12 us; 131,072 x 100 74 us; 131,072 x 10 17 us. Before, with all that there is
once a row as tensors: 266, 400, 48, 17, 392 and 68 us. Prefetching by cp.async (``num_stages``) is
no faster, and Triton 3.6 then moves the stores of the gradient behind those at its targets.

Launches: the forward, the loss from the sums of the programs (``loss_divisor.py``), and the check
of the backward; one more where the rows that are ignored are counted first. They begin before the
one ahead has ended (``early.py``): in us for forward and backward through autograd, whose launch of
a 1 stands between them, 12.6 ordinary and 10.4 early for 1,024 x 1,000 (8.9 where grad_output is
given), 17.2 and 14.9 for 131,072 x 10, 29.3 and 26.7 for 16,384 x 1,000. A counter in place of the
second launch, by which the last program of the forward finds out that it is the last, is no faster
(1,024 programs add to it), and is state. Two warps a row gain 0.2 us, four lose 0.4: to start a
warp takes longer than it saves.

A row that starts at an odd address has up to seven logits before the first 16-byte boundary
(prologue) and after the last (tail): these are small loads of their own, so that the vector body
between them is loaded and stored 16 bytes at a time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastmp.backends import registry
from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.triton import architecture, num_sms
from fastmp.backends.triton.kernels.early import early_launch
from fastmp.backends.triton.kernels.loss_divisor import divisor_kernel, finish_kernel
from fastmp.backends.triton.kernels.loss_rows import backward_kernel, forward_kernel
from fastmp.backends.triton.kernels.loss_short import backward_short_kernel, forward_short_kernel
from fastmp.backends.triton.tiles import LossTile, loss_tile

# Each divisor of the mean is the sum of so many partials, each by one program.
_PARTIALS = 64
# So many on each multiprocessor for rows that are not on the chip, each of at least so many times a
# tile's rows. To start 1,024 programs takes 0.7 us longer than to start 256.
_PROGRAMS_OF_A_CHECK, _ROWS_OF_A_CHECK = 8, 4
# Below this many classes the edges of a row cost more than accesses of one logit.
_SHORTEST_PEELED = 256
_IGNORE_INDEX = -100  # torch's default


def _vector(logits: Tensor) -> tuple[int, bool]:
    """Logits in an access, and whether rows have a prologue and a tail.

    The gradient is dense and must have its 16-byte boundaries where the logits have theirs.
    """
    widest = 16 // logits.element_size()
    classes, stride = logits.shape[1], logits.stride(0)
    if logits.data_ptr() % 16:
        return 1, False
    if stride == classes and classes % widest and classes >= _SHORTEST_PEELED:
        return widest, True
    common = math.gcd(classes, stride, widest)  # a power of 2, as the widest is
    return common, False


def _strided(values: Tensor | None) -> tuple[Tensor | float | None, int | None]:
    """Values of the rows and their stride, 0 for one for all; None with a number.

    A number from the host is an argument of the kernel: no launch, and no wait.
    """
    if values is None:
        return None, None
    if values.dim():
        return values, values.stride(0)
    return (float(values), None) if registry.on_host(values) else (values, 0)


def _constants(tile: LossTile, logits: Tensor, weighted: bool) -> dict[str, Any]:
    """What a tile and the place of the logits make constant in a kernel.

    Class weights take as many registers again as the logits, and so do addresses of one logit each.
    """
    classes = logits.shape[1]
    vector, peel = _vector(logits)
    free = weighted or vector == 1
    options = {"num_warps": tile.warps, "maxnreg": None if free else tile.max_registers}
    if tile.rows > 1:
        return {"BLOCK_N": tile.rows, **options}
    whole = not peel and classes % tile.block == 0
    return {
        "BLOCK_C": tile.block, "VECTOR": vector, "PEEL": peel, "ON_CHIP": tile.on_chip,
        "WHOLE": whole, **options,
    }  # fmt: skip


class _Inputs(NamedTuple):
    """The tensors of a launch, in the form that the kernels read."""

    arguments: tuple[Any, ...]  # of the kernels up to weight_total
    options: tuple[Any, ...]  # from N to smooth_prob
    logits: Tensor


def _inputs(logits: Tensor, spec: LossSpec) -> _Inputs:
    n, c = logits.shape
    if logits.stride(1) != 1 and c > 1:
        logits = logits.contiguous()
    target_b = None if spec.target_b is None else spec.target_b.contiguous()
    weight = None if spec.weight is None else spec.weight.contiguous()
    total = None if weight is None else weight.sum(dtype=torch.float32)
    tensors = (logits, logits.stride(0), spec.target_a.contiguous(), target_b,
               *_strided(spec.lam), weight, total)  # fmt: skip
    options = n, c, spec.ignore_index, 1.0 - spec.smoothing, spec.smoothing / c
    return _Inputs(tensors, options, logits)


def _assumes_divisor(spec: LossSpec) -> bool:
    """Whether the forward takes the number of rows for the divisor, without counting them first.

    A call that names an ignore_index has rows to ignore: its gradient would be written twice.
    """
    return (
        spec.reduction == Reduction.MEAN
        and spec.weight is None
        and spec.ignore_index == _IGNORE_INDEX
    )


def forward(
    logits: Tensor, assumed_grad_output: Tensor | None, compute_grad: bool, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward`` of logits that are not empty.

    A target out of range makes the loss of its row and the row's gradient NaN.
    """
    grad = logits.new_empty(logits.shape if compute_grad else 0)
    written = grad if compute_grad else None
    return *_forward(logits, assumed_grad_output, spec, written, _assumes_divisor(spec)), grad


def forward_in_place(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """``fastmp::loss_forward_`` of dense logits that are not empty: nothing can be put right."""
    return _forward(logits, assumed_grad_output, spec, logits, assumed_divisor=False)


def _forward(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec, grad: Tensor | None,
    assumed_divisor: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, c = logits.shape
    arguments, options, logits = _inputs(logits, spec)
    pair, weighted = spec.target_b is not None, spec.weight is not None
    mean, each = spec.reduction == Reduction.MEAN, spec.reduction == Reduction.NONE
    stats = logits.new_empty((n + 1, 2), dtype=torch.float32)
    early = early_launch(logits.device)
    partial = None
    if grad is not None and mean and not assumed_divisor:
        targets = 2 if pair else 1
        partial = logits.new_empty((targets, _PARTIALS), dtype=torch.float32)
        divisor_kernel[(_PARTIALS, targets)](
            arguments[2], arguments[3], arguments[6], partial, n, c, spec.ignore_index,
            PARTIALS=_PARTIALS, BLOCK_N=1024, num_warps=4, **early,
        )  # fmt: skip
    tile = loss_tile(c, architecture(logits.device), logits.element_size())
    programs = min(triton.cdiv(n, tile.rows), tile.programs * num_sms(logits.device))
    loss = logits.new_empty(n if each else (), dtype=torch.float32)
    sums = None if each else logits.new_empty((4, programs), dtype=torch.float32)
    constants, kernel = _constants(tile, logits, weighted), forward_short_kernel
    if tile.rows == 1:
        kernel = forward_kernel
        ahead = tile.on_chip and logits.element_size() == 2 and constants["VECTOR"] > 1
        constants |= {"PREFETCH": ahead and not weighted, "IN_PLACE": grad is logits}
    kernel[(programs,)](
        *arguments, *_strided(assumed_grad_output), partial, loss if each else None, sums, stats,
        grad, *options, MEAN=mean, SMOOTH=spec.smoothing > 0,
        PARTIALS=_PARTIALS, **constants, **early,
    )  # fmt: skip
    if sums is not None:
        block = min(triton.next_power_of_2(programs), 4096)
        finish_kernel[(1,)](
            sums, loss, stats, n, programs, PAIR=pair, MEAN=mean, WEIGHTED=weighted,
            ASSUMED=assumed_divisor, BLOCK_P=block, num_warps=8, **early,
        )  # fmt: skip
    return loss, stats


def _launch_backward(
    grad: Tensor, grad_output: Tensor, assumed: Tensor | None, logits: Tensor, stats: Tensor,
    spec: LossSpec, check: bool,
) -> None:  # fmt: skip
    n, c = logits.shape
    arguments, options, logits = _inputs(logits, spec)
    tile = loss_tile(c, architecture(logits.device), logits.element_size())
    kernel: Any = backward_kernel if tile.rows == 1 else backward_short_kernel
    programs, rows = tile.programs, tile.rows
    if check:  # its programs most often have nothing to do
        rows *= _ROWS_OF_A_CHECK
        if not tile.on_chip:  # a wrong assumption then costs no more
            programs = _PROGRAMS_OF_A_CHECK
    kernel[(min(triton.cdiv(n, rows), programs * num_sms(logits.device)),)](
        *arguments, *_strided(grad_output), *_strided(assumed), stats, grad, *options,
        MEAN=spec.reduction == Reduction.MEAN, SMOOTH=spec.smoothing > 0, CHECK=check,
        ASSUMED=_assumes_divisor(spec), **_constants(tile, logits, spec.weight is not None),
        **early_launch(logits.device),
    )  # fmt: skip


def backward(grad_output: Tensor, logits: Tensor, stats: Tensor, spec: LossSpec) -> Tensor:
    """``fastmp::loss_backward`` of logits that are not empty."""
    grad = logits.new_empty(logits.shape)
    _launch_backward(grad, grad_output, None, logits, stats, spec, check=False)
    return grad


def ensure_grad(
    grad: Tensor,
    assumed_grad_output: Tensor | None,
    grad_output: Tensor,
    logits: Tensor,
    stats: Tensor,
    spec: LossSpec,
) -> None:
    """``fastmp::loss_ensure_grad_`` of logits that are not empty.

    The device compares: a few microseconds where the gradient is right, and no wait for the host.
    """
    _launch_backward(grad, grad_output, assumed_grad_output, logits, stats, spec, check=True)
