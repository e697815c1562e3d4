"""torch's matrix product, with operands past which oneDNN's AMX kernels read nothing.

On Intel CPUs with AMX oneDNN multiplies 16-bit matrices in tiles of 32 values along K. Where K is
no multiple of 32, the last tile of a row goes on past its end, and zeros of the other operand are
to cancel what was read (oneDNN 3.12, in torch 2.13; github.com/uxlfoundation/oneDNN/issues/5717).
Zero times NaN or inf is NaN: values of the next row, or of the memory between sliced rows, spoil
the result. Zeros in place of that memory cost a copy of both operands.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

TILE_K = 32  # 16-bit values in a row of an AMX tile, 64 bytes


@cache
def uses_amx(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype in AMX tiles on this CPU."""
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_amx_tile_supported())
    return dtype == torch.float16 and bool(torch.cpu._is_amx_fp16_supported())


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias by ``torch.nn.functional.linear``.

    Args:
        a: (M, K), of any strides.
        b: (K, N), the dtype of a.
        bias: (N) or None.

    Returns:
        (M, N), the dtype of a.
    """
    if a.device.type == "cpu" and uses_amx(a.dtype):
        padding = -a.shape[1] % TILE_K
        a, b = _pack(a, padding), _pack(b.t(), padding).t()
    return F.linear(a, b.t(), bias)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in this dtype, rounded once on a GPU; on a CPU to the dtype of a before.

    Args:
        a, b: (M, K) and (K, N), as for ``matmul``.
        dtype: that of a, or fp32.
    """
    if a.dtype == dtype or not a.is_cuda:
        return matmul(a, b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: int = 1) -> None:
    """out = beta out + a @ b, of sums that are not rounded to 16 bits on a GPU; on a CPU they are.

    Args:
        out: (M, N), the dtype of a or fp32; not read if beta is 0.
        a, b: (M, K) and (K, N), as for ``matmul``.
        beta: 0 or 1.
    """
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    elif a.dtype == out.dtype and not (a.device.type == "cpu" and uses_amx(a.dtype)):
        out.addmm_(a, b, beta=beta)
    elif beta:
        out += matmul(a, b)
    else:
        out.copy_(matmul(a, b))


def largest_in_fp16(operand: Tensor) -> float:
    """How large fp16 gradients should be made: 2^14, or 1 where ``product`` rounds to fp16."""
    return 2.0**14 if operand.is_cuda else 1.0


#: Rows between two passes over a sum in fp32 on a GPU. A pass reads and writes 8 C H bytes, the
#: three products of n rows are 6 n C H operations. NVIDIA H200, 2026-11-27, 8,192 rows in bf16,
#: H 4096, C 128256, over the products alone: 12% for n = 1,024, 7% for 2,048, 2% for 4,096.
ROWS_OF_SUM = 4096


def computes_logits_twice(weight: Tensor) -> bool:
    """Whether a weight's gradient is not summed over chunks: in 16 bits on a GPU.

    The sum in fp32 would be 4 C H bytes. On the problem of ``ROWS_OF_SUM`` with chunks of 1,024
    rows 2.2 GB beside inputs and gradients at 1.12 of the products' time, against 0.4 GB at 1.27.
    """
    return weight.device.type != "cpu" and weight.element_size() == 2


def rows_at_once(rows: int, weight: Tensor, sums_gradient: bool) -> int:
    """How many rows a linear layer and its loss take at a time, where the user does not say.

    On a CPU 128 rows of 50,257 fp32 values ran as fast as 512 (32 MB; the second factor, which is
    read again for every product, is 100 MB there). A GPU needs about 512 rows of 128,256 bf16
    values (128 MB) to be busy. Where it sums the gradient of the weight over chunks, it does that
    in fp32: all rows at once are faster, and cost no more memory up to ``ROWS_OF_SUM`` rows more
    than fill as many bytes as that sum.

    Args:
        rows: N.
        weight: (C, H), of the layer.
        sums_gradient: whether the gradient of the weight is needed.
    """
    classes, features = weight.shape
    size = weight.element_size()
    if weight.device.type == "cpu" or not sums_gradient:
        budget = (32 if weight.device.type == "cpu" else 128) << 20
        return max(TILE_K, budget // max(1, classes * size) // TILE_K * TILE_K)
    if (rows - ROWS_OF_SUM) * size <= max(4, size) * features:
        return max(1, rows)
    chunks = -(-rows // ROWS_OF_SUM)
    return -(-rows // chunks)


def _pack(matrix: Tensor, padding: int) -> Tensor:
    """(rows, K) with so many more columns of zeros; the result or its transpose is contiguous."""
    if transposed := matrix.stride(0) < matrix.stride(1):
        matrix = matrix.t()
    if padding:
        matrix = F.pad(matrix, (0, 0, 0, padding) if transposed else (0, padding))
    matrix = matrix.contiguous()
    return matrix.t() if transposed else matrix
