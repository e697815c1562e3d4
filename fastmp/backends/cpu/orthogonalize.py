"""The products of orthogonalize on the native library, where they are faster than torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends import cpu, registry
from fastmp.backends.cpu import gemm_choice
from fastmp.backends.cpu.structs import BatchedGemmArgs


def product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
    *,
    symmetric: bool = False,
    out: Tensor,
) -> Tensor:
    """alpha a b + beta c of batches of bf16 matrices; of a symmetric result half is computed."""
    batch, m, k = a.shape
    n = b.shape[2]
    args = BatchedGemmArgs(
        a=a.data_ptr(),
        a_batch=a.stride(0),
        a_stride=a.stride(1),
        a_k_stride=a.stride(2),
        b=b.data_ptr(),
        b_batch=b.stride(0),
        b_stride=b.stride(2),
        b_k_stride=b.stride(1),
        c=None if c is None else c.data_ptr(),
        out=out.data_ptr(),
        batch=batch,
        m=m,
        n=n,
        k=k,
        alpha=alpha,
        beta=beta,
        symmetric=symmetric,
        threads=torch.get_num_threads(),
    )
    cpu.call("fastmp_batched_gemm", args)
    return out


def _supports(dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"no kernel for {dtype}"
    return None if gemm_choice.prefers_own(dtype) else "torch's product is the faster one here"


registry.register("orthogonalize", "cpu", product, backend="cpu", supports=_supports)
