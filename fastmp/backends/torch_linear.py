"""torch's products of a linear layer: for the reference, and for backends that prefer them."""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor

from fastmp.backends.torch_matmul import matmul


def saves_preactivation(activation: str) -> bool:
    """Whether the backward of this activation needs z; none needs nothing, relu the output."""
    return activation not in ("none", "relu")


def as_rows(tensor: Tensor) -> Tensor:
    """(..., N) as a matrix of rows; unlike reshape(-1, N) also for N = 0."""
    if tensor.dim() == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b on a matrix of rows: of more dimensions torch sums some layouts of bf16 in bf16.

    The result is no view: autograd forbids to write to a view that was made inside an operation.
    """
    z = matmul(as_rows(input), weight.t(), bias)
    shape = (*input.shape[:-1], weight.shape[0])
    return cast(Tensor, torch.ops.aten._unsafe_view(z, shape))


@cache
def has_epilogue() -> bool:
    """Whether torch's private ``_addmm_activation`` is there with the arguments known here."""
    if not hasattr(torch.ops.aten, "_addmm_activation"):
        return False
    arguments = torch.ops.aten._addmm_activation.default._schema.arguments
    return [a.name for a in arguments] == ["self", "mat1", "mat2", "beta", "alpha", "use_gelu"]


def activated_product(input: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """act(x Wᵀ + b) for relu, and on CUDA for gelu_tanh, by the vendor's product and its epilogue.

    On a CPU the function's gelu is that of erf. To be called where ``has_epilogue``.
    """
    use_gelu = activation == "gelu_tanh"
    y = torch._addmm_activation(bias, as_rows(input), weight.t(), use_gelu=use_gelu)
    shape = (*input.shape[:-1], weight.shape[0])
    return cast(Tensor, torch.ops.aten._unsafe_view(y, shape))


def product_gradients(
    dz: Tensor, input: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """dx and dW from dz (M, N); an empty tensor for each that is not needed."""
    dx = matmul(dz, weight).view(input.shape) if needs[0] else dz.new_empty(0)
    dw = matmul(dz.t(), as_rows(input)) if needs[1] else dz.new_empty(0)
    return dx, dw
