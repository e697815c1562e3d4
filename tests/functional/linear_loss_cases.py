"""Inputs of linear_cross_entropy."""

import torch

N, H, C = 77, 24, 53


def problem(dtype=torch.float64, rows=N, *, ignored=False, weighted=False, seed=0):
    """Input, weight, bias, both targets, class weights."""
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((rows, H), (C, H), (C,))
    )
    a, other = (torch.randint(C, (rows,), generator=generator) for _ in range(2))
    if ignored:
        a[:20], other[10:50] = -100, -100
    weight = torch.rand(C, generator=generator).to(dtype) + 0.1 if weighted else None
    return x, w, b, a, other, weight
