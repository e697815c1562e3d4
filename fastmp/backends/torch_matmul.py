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


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, of sums that are not rounded to 16 bits on a GPU; on a CPU they are.

    Args:
        out: (M, N), the dtype of a or fp32.
        a, b: (M, K) and (K, N), as for ``matmul``.
    """
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += matmul(a, b)


def rows_of_product(device: torch.device, row_bytes: int) -> int:
    """How many rows of a result make a product worth its call, a multiple of ``TILE_K``.

    On a CPU 128 rows of 50,257 fp32 values ran as fast as 512 (32 MB; the second factor, which is
    read again for every product, is 100 MB there). A GPU needs about 512 rows of 128,256 bf16
    values (128 MB) to be busy.
    """
    budget = (32 if device.type == "cpu" else 128) << 20
    return max(TILE_K, budget // max(1, row_bytes) // TILE_K * TILE_K)


def _pack(matrix: Tensor, padding: int) -> Tensor:
    """(rows, K) with so many more columns of zeros; the result or its transpose is contiguous."""
    if transposed := matrix.stride(0) < matrix.stride(1):
        matrix = matrix.t()
    if padding:
        matrix = F.pad(matrix, (0, 0, 0, padding) if transposed else (0, padding))
    matrix = matrix.contiguous()
    return matrix.t() if transposed else matrix
