"""Long rows of the loss on ``csrc/cuda/loss.cu``: the sizes of its ring, and its launches."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmp.backends import cuda, registry
from fastmp.backends.abi import DTYPE_CODES, LossSpec, Reduction, RingArgs, unsupported_dtype
from fastmp.backends.cuda import launch, nvrtc

FILE = "cuda/loss.cu"
#: Rows of up to so many classes stay in the registers of the Triton kernel.
CLASSES_IN_REGISTERS = 4096
#: Of bulk copies and clusters.
MINIMUM_CAPABILITY = 9
_C_TYPES = ("float", "fastmp::f16", "fastmp::bf16")  # by fastmp_dtype
WARP = 32
VECTOR_BYTES = 16  # of a chunk, for each consumer
SLOT_BYTES = 16 + 112  # beside a chunk: two barriers, and a row's plan
DIVISOR_PARTS = 64
SUM_THREADS = 1024  # of the one block that adds up the losses
_SMALL_SHARED = 1280  # bytes beside the ring; loss.cu asserts it
_BLOCK_RESERVED = 1024  # bytes of shared memory that CUDA keeps for each block


class RingSize(NamedTuple):
    """How blocks take rows of up to so many bytes."""

    row_bytes: int
    threads: int  # consumers
    cluster: int  # blocks that share a row
    blocks: int  # on a multiprocessor, which share its memory
    each: int  # vectors of a chunk that a consumer takes


# The kernel alone on an H200, 2026-11-27, smoothing and a pair of targets, torch 2.11 (device time,
# % of a copy of 4,245 GB/s; by threads, cluster, blocks, each):
#
#   16384 x 8192    bf16   64, 1, 8, 2: 86    128, 1, 7, 2: 85   128, 1, 7, 1: 83   256, 1, 4, 1: 77
#   16384 x 16384   bf16   128, 1, 5, 2: 88   256, 1, 3, 1: 86   256, 1, 3, 2: 86
#    8192 x 32000   bf16   512, 1, 2, 1: 89   512, 1, 2, 2: 89   256, 1, 3, 2: 88   256, 1, 3, 1: 87
#                          128, 1, 3, 4: 88   384, 1, 2, 1: 87
#                   fp16   512, 1, 2, 1: 90   512, 1, 2, 2: 89   256, 1, 3, 2: 88   256, 1, 3, 1: 87
#    8192 x 50257   bf16   768, 1, 1, 1: 85   768, 1, 1, 2: 85   512, 1, 2, 1: 85   256, 1, 2, 2: 83
#    4096 x 128256  bf16   768, 2, 1, 2: 91   768, 2, 1, 1: 90   512, 2, 1, 1: 89
#
# So with an equal share of the rows for each block. Blocks that take rows when they are ready for
# them, the same day: the forward with divisors and sum, the whole call both ways, and that with
# shares, in % of a copy of 4,297 GB/s:
#
#   8192: 86, 84, 78   16384: 90, 89, 84   32000: 90, 89, 85   in fp16: 90, 89, 85
#   50257: 91, 90, 86   128256, where there are shares: 89, 88, 88
#
# Several blocks on a multiprocessor hide each other's meetings, and few warps do little besides
# the logits. A cluster meets once more for each row and waits for its slower block, so there are
# two only where a row fits into no multiprocessor. The rows between those measured take the size
# whose ring holds about one and a half of them: so much of the next row is on its way while one is
# written. Tried as well, and worth 0 to 0.3%: the exponentials of a row's first one to four vectors
# kept in registers between the passes, and a start before the divisors have been added up.
RING_SIZES = (
    RingSize(18 << 10, threads=64, cluster=1, blocks=8, each=2),
    RingSize(22 << 10, threads=128, cluster=1, blocks=7, each=2),
    RingSize(36 << 10, threads=128, cluster=1, blocks=5, each=2),
    RingSize(52 << 10, threads=256, cluster=1, blocks=3, each=2),
    RingSize(88 << 10, threads=512, cluster=1, blocks=2, each=1),
    RingSize(216 << 10, threads=768, cluster=1, blocks=1, each=1),
    RingSize(432 << 10, threads=768, cluster=2, blocks=1, each=2),
)


class Ring(NamedTuple):
    """The ring for rows of one length on one device."""

    size: RingSize
    slots: int  # chunks
    shared: int  # bytes of a block


@cache
def ring_for(row_bytes: int, sm_shared: int) -> Ring | None:
    """The ring for rows of so many bytes; None: two blocks together have too little memory.

    Args:
        row_bytes: of the logits of a row.
        sm_shared: bytes of shared memory of a multiprocessor.
    """
    fitting = (ring_of(size, row_bytes, sm_shared) for size in RING_SIZES)
    rings = (ring for ring in fitting if ring is not None and row_bytes <= ring.size.row_bytes)
    return next(rings, None)


def ring_of(size: RingSize, row_bytes: int, sm_shared: int) -> Ring | None:
    """The ring of one size, with all the memory that it may have; None: a row does not fit."""
    chunk = VECTOR_BYTES * size.threads * size.each
    room = sm_shared // size.blocks - _BLOCK_RESERVED - _SMALL_SHARED
    slots = room // (chunk + SLOT_BYTES)
    vectors = -(-(row_bytes // VECTOR_BYTES) // size.cluster)
    if slots < -(-vectors // (size.threads * size.each)):
        return None
    return Ring(size, slots, slots * (chunk + SLOT_BYTES))


def kernel_name(dtype: torch.dtype, smooth: str, aligned: bool, size: RingSize) -> str:
    """The C++ name of the kernel; smooth: none, equal or weighted."""
    config = (
        f"fastmp::Config<{_C_TYPES[DTYPE_CODES[dtype]]}, fastmp::Smooth::{smooth}, "
        f"{str(aligned).lower()}, {size.threads}, {size.cluster}, {size.each}>"
    )
    if size.cluster > 1:
        return f"fastmp::loss_half_rows<{config}>"
    return f"fastmp::loss_rows<{config}, {size.blocks}>"


@cache
def sm_shared(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor; 0 on a GPU without bulk copies."""
    if torch.cuda.get_device_capability(device)[0] < MINIMUM_CAPABILITY:
        return 0
    if cuda.supports_device(device) is not None:
        return 0
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@cache
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def supports(
    logits: Tensor, assumed_grad_output: Tensor | None, compute_grad: bool, spec: LossSpec
) -> str | None:
    """None, or the reason why these rows are left to another backend."""
    if not compute_grad:
        return "the loss alone reads a row once anyway"
    rows, classes = logits.shape
    if rows == 0 or classes <= CLASSES_IN_REGISTERS:
        return f"rows of at most {CLASSES_IN_REGISTERS} classes"
    reason = unsupported_dtype(logits.dtype)
    if reason is not None:
        return reason
    shared = sm_shared(logits.device)
    if shared == 0:
        return "no bulk copies before compute capability 9.0"
    if ring_for(classes * logits.element_size(), shared) is None:
        return "a row does not fit into two multiprocessors"
    return None


def forward(
    logits: Tensor, assumed_grad_output: Tensor | None, compute_grad: bool, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward``, with the gradient, of rows that ``supports`` accepts.

    A target out of range makes the loss of its row and the row's gradient NaN.
    """
    grad = logits.new_empty(logits.shape)
    return *_forward(logits, assumed_grad_output, spec, grad), grad


def forward_in_place(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """``fastmp::loss_forward_``: a row is in shared memory before its gradient is written."""
    return _forward(logits, assumed_grad_output, spec, logits)


def _forward(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec, grad: Tensor
) -> tuple[Tensor, Tensor]:
    n, c = logits.shape
    row_losses = logits.new_empty(n, dtype=torch.float32)
    stats = logits.new_empty((n + 1, 2), dtype=torch.float32)
    ring = ring_for(c * logits.element_size(), sm_shared(logits.device))
    assert ring is not None
    return run(logits, assumed_grad_output, spec, row_losses, stats, grad, ring), stats


def _tensor_or_number(values: Tensor | None) -> tuple[Tensor | None, float]:
    """In fp32, on the device; or a number from the host, an argument of the kernel. None: 1."""
    if values is None:
        return None, 1.0
    if values.dim() or not registry.on_host(values):
        return values.float(), 1.0
    return None, float(values)


def run(
    logits: Tensor,
    grad_output: Tensor | None,
    spec: LossSpec,
    row_losses: Tensor,
    stats: Tensor,
    grad: Tensor,
    ring: Ring,
) -> Tensor:
    """Write row_losses (N), stats (N + 1, 2) and grad (N, C); ``ring`` holds at least a row.

    Three launches, which overlap: the divisors of the mean, the rows, the sum of their losses.

    Returns:
        the loss: their sum, or ``row_losses`` for reduction none.
    """
    n, c = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    target_a = spec.target_a.contiguous()
    target_b = None if spec.target_b is None else spec.target_b.contiguous()
    lam, lam_value = _tensor_or_number(spec.lam)
    grad_output, grad_output_value = _tensor_or_number(grad_output)
    weight = None if spec.weight is None else spec.weight.float().contiguous()
    weight_total = None if weight is None else weight.sum()
    partials, loss = None, row_losses
    taken = logits.new_empty(1, dtype=torch.int32)
    if spec.reduction == Reduction.MEAN:
        partials = logits.new_empty((2, DIVISOR_PARTS), dtype=torch.float32)
    if spec.reduction != Reduction.NONE:
        loss = logits.new_empty((), dtype=torch.float32)
    tensors = {
        "logits": logits, "target_a": target_a, "target_b": target_b, "lam": lam, "weight": weight,
        "weight_total": weight_total, "grad_output": grad_output, "divisor_partials": partials,
        "taken": taken, "loss": row_losses, "total": loss, "stats": stats, "grad": grad,
    }  # fmt: skip
    args = RingArgs(
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        row_stride=logits.stride(0),
        lam_stride=lam.stride(0) if lam is not None and lam.dim() else 0,
        ignore_index=spec.ignore_index,
        target_prob=1.0 - spec.smoothing,
        smooth_prob=spec.smoothing / c,
        lam_value=lam_value,
        grad_output_value=grad_output_value,
        rows=n,
        classes=c,
        slots=ring.slots,
    )
    device = logits.device
    divisors = _small(f"fastmp::loss_divisors<{DIVISOR_PARTS}>", device)
    divisors.launch(1 if partials is None else DIVISOR_PARTS, nvrtc.BLOCK_SIZE, args)
    smooth = "none" if spec.smoothing == 0 else "equal" if weight is None else "weighted"
    shift = (logits.data_ptr() - grad.data_ptr()) % VECTOR_BYTES
    aligned = shift == 0 and (logits.stride(0) - c) * logits.element_size() % VECTOR_BYTES == 0
    size = ring.size
    name = kernel_name(logits.dtype, smooth, aligned, size)
    clusters = min(n, size.blocks * _num_sms(device) // size.cluster)
    rows = launch.function(FILE, name, device, ring.shared)
    blocks = clusters * size.cluster
    rows.launch(blocks, size.threads + WARP, args, shared=ring.shared, early=True)
    if loss is not row_losses:
        total = _small(f"fastmp::loss_sum<{SUM_THREADS}>", device)
        total.launch(1, SUM_THREADS, args, early=True)
    return loss


def _small(name: str, device: torch.device) -> launch.Function:
    """A kernel before or after the rows, with their split of a multiprocessor's memory.

    Blocks with another split wait until the multiprocessor is idle: 4 of 159 us for 16,384 rows of
    8,192 bf16 logits on an H200.
    """
    return launch.function(FILE, name, device, _SMALL_SHARED)


def supports_in_place(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec
) -> str | None:
    """As ``supports``, of dense logits."""
    if not logits.is_contiguous():
        return "the gradient is dense, these logits are not"
    return supports(logits, assumed_grad_output, True, spec)


registry.register(
    "loss_forward_", "cuda", forward_in_place, backend="cuda", supports=supports_in_place,
    narrow=True,
)  # fmt: skip
registry.register(
    "loss_forward", "cuda", forward, backend="cuda", supports=supports, narrow=True,
    detail=f"rows of more than {CLASSES_IN_REGISTERS:,} classes, with their gradient, on GPUs of "
    "compute capability 9.0 and newer",
)  # fmt: skip
