"""The operations on an NVIDIA GPU on memory at any address, of any strides and size."""

import sys

import pytest
import torch
import torch.nn.functional as F

from fastmp.backends.abi import Reduction
from fastmp.data.mixup import Mixup
from fastmp.functional import cross_entropy, linear_cross_entropy
from fastmp.ops.mix import mix_reference
from tests.functional.linear_cases import check as check_linear
from tests.functional.linear_cases import lay_out
from tests.functional.loss_cases import check as check_loss
from tests.kernels.gpu.test_operations import (
    DEVICE,
    HALVES,
    MEAN,
    OBSTACLE,
    STD,
    assert_same,
    mix_case,
)

pytestmark = [
    pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE),
    pytest.mark.usefixtures("every_size"),
]

LAYOUTS = ["dense", "transposed", "sliced", "every second", "offset"]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [10, 1001, 4096, 8200, 33003, 120001])
def test_loss_at_any_address(classes, layout, dtype):
    z = lay_out(torch.randn(9, classes, device=DEVICE).to(dtype), layout)
    a, b = torch.randint(classes, (9, 2), device=DEVICE).unbind(1)
    lam, weight = torch.rand(9, device=DEVICE), torch.rand(classes, device=DEVICE).to(dtype) + 0.1
    lam, weight = lay_out(lam, layout), lay_out(weight, layout)
    problem = (z, a, b, lam, weight, -100, "mean", 0.1, 512.0)
    check_loss(problem, scales=(None, 512.0), device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("classes", [10, 1001, 4099, 16385, 50257, 120001, 300001])
def test_the_gradient_takes_the_place_of_the_logits(classes, dtype):
    torch.manual_seed(0)
    z = torch.randn(300, classes, device=DEVICE).to(dtype)
    a, b = torch.randint(classes, (2, 300), device=DEVICE)
    spec = a, b, torch.tensor(0.25, device=DEVICE), None, -100, Reduction.MEAN, 0.1
    expected = torch.ops.fastmp.loss_forward(z, None, True, *spec)
    loss, stats = torch.ops.fastmp.loss_forward_(z, None, *spec)
    assert all(map(torch.equal, (loss, stats, z), expected))


def test_the_sum_of_a_loss_for_each_row():
    """grad_output is one number with stride 0."""
    z, y = torch.randn(99, 10, device=DEVICE).half(), torch.randint(10, (99,), device=DEVICE)
    z.requires_grad_()
    (each,) = torch.autograd.grad((cross_entropy(z, y, reduction="none") * 2).sum(), z)
    (view,) = torch.autograd.grad(cross_entropy(z, y, reduction="none").sum(), z)
    (total,) = torch.autograd.grad(cross_entropy(z, y, reduction="sum"), z)
    assert_same([each / 2, view], [total, total], 1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(70, 136, 72), (300, 264, 520), (33, 33, 33)], ids=str)
def test_linear_at_any_address(shape, layout, dtype):
    rows, columns, depth = shape
    shapes = (rows, depth), (columns, depth), (columns,), (rows, columns)
    x, w, b, grad = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    tensors = [lay_out(t, layout) for t in (x, w / depth**0.5, b, grad)]
    for activation in ("gelu", "relu"):
        check_linear(*tensors, activation, own=False)


def assert_mixed(out, x, index, lam=None, box=None):
    """Against fp64: one rounding to fp16, and a few of values up to 5 in fp32."""
    mean, std = (torch.tensor(v, dtype=torch.float64, device=x.device) for v in (MEAN, STD))
    lam = None if lam is None else lam.double()
    affine = 1 / (255 * std), -mean / std
    exact = mix_reference(x.double(), lam, index, box, *affine, torch.float64)
    assert out.dtype == torch.float16
    assert ((out.double() - exact).abs() <= 2**-11 * 1.01 * exact.abs() + 4e-6).all()


PLACES = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: F.pad(x, (3, 1, 2, 2), value=9)[:, :, 2:-2, 3:-1],
    "offset": lambda x: F.pad(x.flatten(), (1, 0), value=9)[1:].view_as(x),
}


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("place", PLACES)
def test_mix_at_any_address(place, kind):
    case = mix_case(kind, 0)
    x, index, lam, box, _ = case.tensors
    chosen = {"lam": lam} if kind == "mixup" else {"box": box}
    assert_mixed(case.forward(PLACES[place](x), index, lam, box), x, index, **chosen)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
def test_mixup_is_that_of_the_cpu(alphas, per_sample):
    x, y = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (16,))
    drawn = []
    for device, dtype in ((DEVICE, torch.float16), ("cpu", torch.float64)):
        draw = torch.Generator().manual_seed(3)
        mixup = Mixup(*alphas, per_sample=per_sample, generator=draw, mean=MEAN, std=STD,
                      dtype=dtype)  # fmt: skip
        drawn.append(mixup(x.to(device), y.to(device)))
    (ours, our_target), (theirs, their_target) = drawn
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2**-11 * 1.01, atol=4e-6)
    assert all(map(torch.equal, [t.cpu() for t in our_target], their_target))


@pytest.mark.parametrize(("chunk", "twice"), [(128, True), (128, False), (300, False)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_linear_loss_is_within_twice_torchs_error(dtype, chunk, twice, monkeypatch):
    """3 times for the weight's gradient; a grad_output that is no power of two."""
    module = sys.modules["fastmp.functional.linear_cross_entropy"]
    monkeypatch.setattr(module, "computes_logits_twice", lambda weight: twice)
    torch.manual_seed(0)
    x, w = torch.randn(300, 264, device=DEVICE), torch.randn(5001, 264, device=DEVICE) / 16
    y = torch.randint(5001, (300,), device=DEVICE)
    leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def grads(loss, tensors):
        return torch.autograd.grad(loss, tensors, torch.full_like(loss, 300.0))

    exact = grads(F.cross_entropy(F.linear(*wide), y), wide)
    theirs = grads(F.cross_entropy(F.linear(*leaves), y), leaves)
    ours = grads(linear_cross_entropy(*leaves, y, chunk=chunk), leaves)
    for own, other, right, factor in zip(ours, theirs, exact, (2, 3), strict=True):
        error, allowed = ((g.double() - right).abs().max() for g in (own, other))
        assert error <= factor * allowed + torch.finfo(dtype).eps / 16 * right.abs().max()
