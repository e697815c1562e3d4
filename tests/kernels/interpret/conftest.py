"""Triton's interpreter with a GPU's bf16, and new memory full of NaN."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: no kernels to run")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """New memory is full of NaN: elements that a kernel does not write are seen."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def rounded_and_widened_bf16(monkeypatch):
    """As on a GPU. The interpreter cuts fp32 off to bf16, and multiplies bf16 as if integers."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, product = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.tensor(source.data).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    def widen(self, operand):
        wide = operand.dtype.scalar == tl.bfloat16
        return cast(self, operand, tl.float32) if wide else operand

    def create_dot(self, a, b, *rest):
        return product(self, widen(self, a), widen(self, b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
