"""torch's own operator cases: its samples of ``linear`` and ``cross_entropy`` in every dtype.

They come from ``torch.testing._internal.common_methods_invocations.op_db``. Values and gradients
are compared with fp64 and torch in the same dtype; ours refuses the dtypes that torch refuses.
test_torch_optimizers lists the cases that are left out.
"""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

import fastmp

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

NAMES = {
    "nn.functional.linear": (F.linear, fastmp.functional.linear),
    "nn.functional.cross_entropy": (F.cross_entropy, fastmp.functional.cross_entropy),
}
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHERS = [torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8]  # fmt: skip


@cache
def samples(name, dtype):
    """torch's samples, (input, arguments, keywords), the same at every call."""
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == name and not op.variant_test_name)
    torch.manual_seed(5)
    wants_grad = dtype.is_floating_point or dtype.is_complex
    found = info.sample_inputs("cpu", dtype, requires_grad=wants_grad)
    return [(s.input, s.args, s.kwargs) for s in found]


def differentiable(values):
    return [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]


def evaluate(function, sample, dtype=None):
    """The value and the gradients of the sum of its squares; in another dtype if one is given."""

    def cast(value):
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not is_float:
            return value
        made = value.detach().to(dtype or value.dtype)
        return made.requires_grad_(value.requires_grad)

    first, rest, keywords = sample
    first, *rest = [cast(v) for v in (first, *rest)]
    keywords = {k: cast(v) for k, v in keywords.items()}
    out = function(first, *rest, **keywords)
    leaves = differentiable([first, *rest, *keywords.values()])
    (out.double() ** 2).sum().backward()
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, dtype):
    torchs, ours = NAMES[name]
    assert len(samples(name, dtype)) >= 18
    for sample in samples(name, dtype):
        exact = evaluate(torchs, sample, torch.float64)
        found, theirs = evaluate(ours, sample), evaluate(torchs, sample)
        assert len(found) == len(theirs)
        for a, b, reference in zip(found, theirs, exact, strict=True):
            assert a.shape == b.shape
            if not reference.numel():
                continue
            if dtype == torch.float64:  # torch's own is the reference
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
                continue
            error, torch_error = ((t - reference).abs().max() for t in (a, b))
            # grad_output is 2 out: one more rounding of out, half an ulp of its largest
            slack = reference.abs().max() * torch.finfo(dtype).eps
            assert error <= 2 * torch_error + slack, (sample, error, torch_error)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_in_fp64(name):
    """gradcheck on every sample, forward mode and vmap over gradients with it; of second order for
    linear, whose second derivative is ours."""
    _, ours = NAMES[name]
    for first, rest, keywords in samples(name, torch.float64):
        inputs = tuple(differentiable([first, *rest, *keywords.values()]))
        if not first.numel():
            continue

        def function(*values, kept=(first, rest, keywords)):
            given = iter(values)

            def swap(v):
                return next(given) if isinstance(v, torch.Tensor) and v.requires_grad else v

            one, others, named = kept
            return ours(swap(one), *map(swap, others), **{k: swap(v) for k, v in named.items()})

        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True
        )
        if name.endswith("linear"):
            assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_linear_of_complex_and_whole_numbers(dtype):
    """What torch computes, ours computes."""
    torchs, ours = NAMES["nn.functional.linear"]
    for first, rest, keywords in samples("nn.functional.linear", dtype):
        torch.testing.assert_close(ours(first, *rest, **keywords), torchs(first, *rest, **keywords))


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_cross_entropy_of_complex_and_whole_numbers_is_refused_as_by_torch(dtype):
    logits, target = torch.ones(2, 3).to(dtype), torch.tensor([0, 1])
    for function in NAMES["nn.functional.cross_entropy"]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            function(logits, target)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit():
    x, w, target = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 3, 1])

    def loss(x, w):
        y = fastmp.functional.linear(x, w, None, "gelu")
        return fastmp.functional.cross_entropy(y, target)

    assert torch.equal(torch.jit.trace(loss, (x, w))(x + 1, w), loss(x + 1, w))
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(fastmp.functional.linear)
